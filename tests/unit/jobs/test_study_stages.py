"""Stages are planned with what they read, found again by what decides them, refused as a whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.config import frozen
from hybrid_train.jobs.study import _locked
from hybrid_train.jobs.study_plan import plan_study
from hybrid_train.jobs.study_stages import Stages
from hybrid_train.schema.formats import KEY, STAGE
from hybrid_train.schema.problems import ConfigError, UserError, collect
from hybrid_train.schema.study import ShortForm, Stage, StudyJob, Variant
from hybrid_train.schema.train import TrainJob

TINY = ["experiment=tiny_cpu"]
PARENT = Stage(overrides=TINY)


@pytest.fixture(autouse=True)
def outside_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def study(folder: Path, stages: dict[str, Stage], **more: Any) -> StudyJob:
    last = list(stages)[-1] if stages else None
    healed = [f"checkpoint.load={{{last}}}", "checkpoint.load_only=weights"] if last else []
    values: dict[str, Any] = {
        "base": TINY, "baseline": "scratch", "seeds": [1, 2],
        "variants": {"scratch": Variant(), "healed": Variant(overrides=healed)},
    }  # fmt: skip
    values |= {"run_dir": str(folder / "study"), "stages_dir": str(folder / "kept"), **more}
    return StudyJob(title="Parents", stages=stages, **values)


def hash_of(folder: Path, stages: dict[str, Stage], name: str = "parent") -> str:
    (folder / "scratch").mkdir(exist_ok=True, parents=True)
    planned = Stages(study(folder, stages), folder / "scratch").of(name, 1)
    assert planned is not None
    return planned.digest


def test_a_variant_takes_the_model_of_a_parent_that_is_not_trained_yet(tmp_path: Path) -> None:
    parent = Stage(overrides=[*TINY, "model.hidden_size=32"])
    planned = plan_study(study(tmp_path, {"parent": parent}))
    assert [stage.name for stage in planned.stages] == ["parent"]
    hidden = {run.variant: run.job.model.hidden_size for run in planned.runs if run.job}
    assert hidden == {"scratch": 64, "healed": 32}
    healed = [run for run in planned.runs if run.variant == "healed"]
    assert all(f"checkpoint.load={planned.stages[0].path}" in run.lines for run in healed)
    assert not (tmp_path / "kept").exists()
    assert not (tmp_path / "study").exists()


def test_a_stage_is_the_same_wherever_it_writes_and_whoever_watches(tmp_path: Path) -> None:
    more = ["runtime.threads=2", "tracking.console_interval=3", "run_dir=a", "train.seed=1234"]
    other = Stage(overrides=["model=tiny", *TINY, *more, "checkpoint.interval=7"])
    first = hash_of(tmp_path / "first", {"parent": PARENT})
    assert hash_of(tmp_path / "second", {"mother": other}, "mother") == first


def test_what_decides_the_result_and_what_a_stage_reads_make_another(tmp_path: Path) -> None:
    child = Stage(command="convert", overrides=["export={parent}"])
    changes = ([], ["train.seed=5"], ["train.tokens=5120"], ["precision=bf16"])
    parents = [Stage(overrides=[*TINY, *change]) for change in changes]
    assert len({hash_of(tmp_path, {"parent": one}) for one in parents}) == len(parents)
    assert (
        len({hash_of(tmp_path, {"parent": one, "out": child}, "out") for one in parents[:2]}) == 2
    )


def test_other_content_of_a_file_makes_another_stage(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    overrides = [f"input={text}", "vocab_size=300"]
    stage = Stage(command="data train_tokenizer", overrides=overrides)
    found = []
    for content in ("one", "two", "one"):
        text.write_text(content)
        found.append(hash_of(tmp_path, {"parent": stage}))
    assert found[0] == found[2] != found[1]


def test_a_stage_with_a_seed_is_made_for_each_and_another_once(tmp_path: Path) -> None:
    stages = {
        "parent": PARENT,
        "own": Stage(overrides=[*TINY, "train.seed={seed}"]),
        "out": Stage(command="convert", overrides=["export={own}"]),
    }
    planned = plan_study(study(tmp_path, stages))
    names = [stage.name for stage in planned.stages]
    assert sorted(names) == ["out seed 1", "out seed 2", "own seed 1", "own seed 2", "parent"]
    for run in planned.runs:
        if run.variant == "healed":
            assert [one.name for one in run.stages().values()] == [
                f"own seed {run.seed}", f"out seed {run.seed}",
            ]  # fmt: skip


def test_a_run_from_another_parent_is_not_taken_for_one_of_the_study(tmp_path: Path) -> None:
    run = plan_study(study(tmp_path, {"parent": PARENT})).runs[1]
    assert run.job is not None
    run.job.checkpoint.load = str(run.inputs[0].path)
    frozen.freeze(run.job, run.folder)
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 2560}\n')
    other = study(tmp_path, {"parent": Stage(overrides=[*TINY, "train.seed=5"])})
    with pytest.raises(UserError, match=r"checkpoint\.load: .*healed seed 1"):
        plan_study(other)


def test_a_finished_stage_is_known_by_a_mark_that_is_whole(tmp_path: Path) -> None:
    job = study(tmp_path, {"parent": PARENT})
    (stage,) = plan_study(job).stages
    assert isinstance(stage.job, TrainJob)
    frozen.freeze(stage.job, stage.path)
    assert not stage.is_finished()
    stage.mark.write_text('{"hash": ')
    assert not stage.is_finished()
    stage.finish(3.0)
    assert (
        plan_study(study(tmp_path / "other", {"mother": PARENT}, stages_dir=job.stages_dir))
        .stages[0]
        .is_finished()
    )
    shutil.rmtree(stage.path)
    assert not stage.is_finished()
    with _locked([stage]):  # it runs again, and may be killed in the middle
        frozen.freeze(stage.job, stage.path)
    assert not stage.is_finished()


def test_an_early_part_needs_only_its_own_stages(tmp_path: Path) -> None:
    parts = {"first": ["scratch"], "second": ["healed"]}
    job = study(tmp_path, {"parent": PARENT}, parts=parts, part="first").as_asked()
    planned = plan_study(job)
    assert {run.variant for run in planned.runs} == {"scratch"}
    assert not planned.stages


def test_the_short_form_changes_every_training(tmp_path: Path) -> None:
    form = ShortForm(overrides=["train.tokens=512"])
    planned = plan_study(
        study(tmp_path, {"parent": PARENT}, short=True, short_form=form).as_asked()
    )
    assert "train.tokens=512" in planned.stages[0].lines
    assert {(run.seed, run.job and run.job.train.tokens) for run in planned.runs} == {(1, "512")}
    assert all(run.folder.is_relative_to(tmp_path / "study" / "short") for run in planned.runs)


def test_overrides_reach_targets_since_they_are_those_of_the_rows_of_a_training(
    tmp_path: Path,
) -> None:
    told = Stage(
        command="distill_targets",
        overrides=[*TINY, "objective.teacher={parent}", "train.seed={seed}"],
    )
    learns = Variant(overrides=["objective=distill", "objective.targets={told}"])
    job = study(
        tmp_path,
        {"parent": PARENT, "told": told},
        variants={"scratch": Variant(), "learns": learns},
        overrides=["train.tokens=512"],
    )
    planned = plan_study(job)
    lines = {stage.name: stage.lines for stage in planned.stages}
    assert lines.keys() == {"parent", "told seed 1", "told seed 2"}
    assert all("train.tokens=512" in one for one in lines.values())
    seeds = {run.seed: run.inputs[0].name for run in planned.runs if run.variant == "learns"}
    assert seeds == {1: "told seed 1", 2: "told seed 2"}
    assert all(stage.resumes for stage in planned.stages)


def cut(*sizes: str) -> dict[str, Stage]:
    """A parent, its ranking and a child."""
    ranked = ["checkpoint={parent}", "rows=8"]
    asked = ["checkpoint={parent}", "ranking={ranking}", *sizes]
    return {
        "parent": PARENT,
        "ranking": Stage(command="importance", overrides=ranked),
        "child": Stage(command="prune", overrides=asked),
    }


def test_a_variant_takes_the_model_of_a_child_that_is_not_cut_yet(tmp_path: Path) -> None:
    planned = plan_study(study(tmp_path, cut("model.hidden_size=32", "mtp=drop")))
    assert [stage.name for stage in planned.stages] == ["parent", "ranking", "child"]
    models = {run.variant: run.job.model for run in planned.runs if run.job}
    scratch, healed = models["scratch"], models["healed"]
    assert (scratch.hidden_size, healed.hidden_size) == (64, 32)
    assert scratch.pattern.startswith(healed.pattern + "/")
    assert not (tmp_path / "kept").exists()


def test_a_child_whose_layers_scores_choose_is_known_once_it_is_cut(tmp_path: Path) -> None:
    planned = plan_study(study(tmp_path, cut("depth.layers=2")))
    assert {run.variant: run.job is not None for run in planned.runs} == {
        "scratch": True, "healed": False,
    }  # fmt: skip


def test_a_child_that_cannot_be_is_refused_before_its_parent_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"child: model\.hidden_size = 128: must be at most 64"):
        plan_study(study(tmp_path, cut("model.hidden_size=128")))


def test_a_child_may_be_healed_ranked_and_cut_again(tmp_path: Path) -> None:
    load = ["checkpoint.load={child}", "checkpoint.load_only=weights", "train.tokens=1024"]
    again = ["checkpoint={healed}", "ranking={again}", "model.hidden_size=32"]
    stages = {
        **cut("model.hidden_size=48"),
        "healed": Stage(overrides=[*TINY, *load]),
        "again": Stage(command="importance", overrides=["checkpoint={healed}", "rows=8"]),
        "smaller": Stage(command="prune", overrides=again),
    }
    variants = {
        name: Variant(overrides=[f"checkpoint.load={{{name}}}", "checkpoint.load_only=weights"])
        for name in ("child", "smaller")
    }
    # A stage has the name of no variant.
    named = {f"{name}_healed": one for name, one in variants.items()}
    job = study(tmp_path, stages, variants={"scratch": Variant(), **named}, seeds=[1])
    planned = plan_study(job)
    widths = {run.variant: run.job and run.job.model.hidden_size for run in planned.runs}
    assert widths == {"scratch": 64, "child_healed": 48, "smaller_healed": 32}
    (last,) = (run for run in planned.runs if run.variant == "smaller_healed")
    assert [one.name for one in last.stages().values()] == list(stages)


BAD = [
    ({"a": Stage(overrides=["export={nothing}"])}, "stages.a.overrides", "no stage nothing"),
    ({"a": Stage(overrides=["export={a}"])}, "stages.a.overrides", "cannot read itself"),
    (
        {"a": Stage(overrides=["export={b}"]), "b": Stage(overrides=["export={a}"])},
        "stages.a.overrides",
        "b stands below it",
    ),
    ({"a": Stage(overrides=["export={scratch}"])}, "stages.a.overrides", "scratch is a variant"),
    ({"a": Stage()}, "stages.a.overrides", "is empty"),
    ({"scratch": PARENT}, "stages.scratch", "the name of a variant"),
    ({"seed": PARENT}, "stages.seed", "another one"),
    ({"a/b": PARENT}, "stages.a/b", "must be letters"),
]


@pytest.mark.parametrize(("stages", "path", "text"), BAD, ids=[one[2] for one in BAD])
def test_what_makes_no_stages_is_named(
    tmp_path: Path, stages: dict[str, Stage], path: str, text: str
) -> None:
    job = study(tmp_path, stages, variants={"scratch": Variant()})
    (problem,) = collect(job)
    assert problem.path == path
    assert text in problem.rule


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"parts": {"first": []}}, "parts.first"),
        ({"parts": {"first": ["haeled"]}}, "parts.first"),
        ({"part": "frist", "parts": {"first": ["healed"]}}, "part"),
        ({"part": "first", "parts": {"first": ["healed"]}, "only": ["healed"]}, "only"),
        ({"short": True}, "short"),
        ({"short_form": ShortForm(seeds=[1, 1])}, "short_form.seeds"),
    ],
    ids=str,
)
def test_what_makes_no_part_and_no_short_form_is_named(
    tmp_path: Path, more: dict[str, Any], path: str
) -> None:
    assert [one.path for one in collect(study(tmp_path, {"parent": PARENT}, **more))] == [path]


def test_problems_of_stages_are_reported_with_their_names(tmp_path: Path) -> None:
    stages = {
        "parent": Stage(overrides=[*TINY, "model.hidden_size=-1"]),
        "sizes": Stage(command="cuont", overrides=["model=tiny"]),
    }
    with pytest.raises(ConfigError) as refused:
        plan_study(study(tmp_path, stages, variants={"scratch": Variant()}))
    text = str(refused.value)
    assert "parent: model.hidden_size = -1: must be" in text
    assert "sizes: command = cuont: must be one of" in text
    assert "nearest: count" in text


def test_what_writes_no_folder_cannot_be_referred_to(tmp_path: Path) -> None:
    sizes = Stage(command="count", overrides=["model=tiny", "model.vocab_size=512"])
    with pytest.raises(ConfigError, match="count writes no folder"):
        plan_study(study(tmp_path, {"sizes": sizes}))


def test_a_stage_that_a_newer_version_ended_is_refused(tmp_path: Path) -> None:
    planned = plan_study(study(tmp_path, {"parent": PARENT}))
    (stage,) = planned.stages
    stage.path.mkdir(parents=True)
    stage.finish(1.0)
    assert stage.is_finished()
    said = json.loads(stage.mark.read_text())
    said[KEY]["version"] = STAGE.version + 1
    stage.mark.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"stage of a study, format 2\).*upgrade hybrid_train"):
        stage.record()
    del said[KEY]  # of before there were numbers
    stage.mark.write_text(json.dumps(said))
    assert stage.is_finished()
