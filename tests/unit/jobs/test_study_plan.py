"""Every variant of a study is composed and checked before any run starts."""

from pathlib import Path
from typing import Any

import pytest

from hybrid_train.config import compose, frozen
from hybrid_train.jobs.study_plan import PlannedRun, are_paired, plan_study
from hybrid_train.schema.problems import ConfigError, UserError, collect
from hybrid_train.schema.study import ShortForm, StudyJob, Variant
from hybrid_train.tracking.jsonl import JsonLines

TINY = ["experiment=tiny_cpu"]


@pytest.fixture(autouse=True)
def outside_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def study(run_dir: Path, *, seeds: tuple[int, ...] = (1, 2), **more: Any) -> StudyJob:
    variants = {
        "fast": Variant(overrides=["schedule.peak_lr=2e-3"]),
        "plain": Variant(),
        "slow": Variant(overrides=["schedule=cosine", "schedule.peak_lr=5e-4"]),
    }
    values = {"base": TINY, "baseline": "plain", "variants": variants, **more}
    return StudyJob(title="Rates", run_dir=str(run_dir), seeds=list(seeds), **values)


def runs_of(job: StudyJob) -> list[PlannedRun]:
    return list(plan_study(job).runs)


def refusal(job: StudyJob) -> str:
    with pytest.raises(UserError) as refused:
        plan_study(job)
    return str(refused.value)


def test_every_variant_runs_with_every_seed_and_differs_in_nothing_else(tmp_path: Path) -> None:
    runs = runs_of(study(tmp_path))
    names = ["plain", "fast", "slow"]  # seed after seed, the baseline first
    assert [(run.variant, run.seed) for run in runs] == [(n, s) for s in (1, 2) for n in names]
    assert [run.job.train.seed for run in runs] == [1, 1, 1, 2, 2, 2]
    assert [run.job.schedule.peak_lr for run in runs[:3]] == [1e-3, 2e-3, 5e-4]
    assert [run.job.schedule.kind for run in runs[:3]] == ["wsd", "wsd", "cosine"]
    assert runs[4].folder == tmp_path / "fast" / "seed_2"
    assert all(run.job.model == runs[0].job.model for run in runs)


def test_ones_own_overrides_come_after_those_of_a_variant(tmp_path: Path) -> None:
    runs = runs_of(study(tmp_path, overrides=["schedule.peak_lr=7e-3"]))
    assert {run.job.schedule.peak_lr for run in runs} == {7e-3}


def test_a_part_of_the_variants_keeps_the_baseline(tmp_path: Path) -> None:
    runs = runs_of(study(tmp_path, only=["slow"], seeds=(3,)))
    assert [run.name for run in runs] == ["plain seed 3", "slow seed 3"]


def test_what_a_variant_is_compared_with_runs_beside_it(tmp_path: Path) -> None:
    variants = {
        "plain": Variant(),
        "last": Variant(against="middle"),
        "middle": Variant(against="first"),
        "first": Variant(),
        "other": Variant(),
    }
    job = study(tmp_path, variants=variants, only=["last"], seeds=(3,))
    assert [run.variant for run in runs_of(job)] == ["plain", "last", "middle", "first"]


def test_the_short_form_may_have_fewer_variants_unless_some_are_asked_for(tmp_path: Path) -> None:
    form = ShortForm(overrides=["train.tokens=512"], only=["fast"])
    short = {"short": True, "short_form": form}
    assert set(study(tmp_path, **short).as_asked().chosen()) == {"plain", "fast"}
    assert set(study(tmp_path, **short, only=["slow"]).as_asked().chosen()) == {"plain", "slow"}


def test_problems_of_all_variants_are_reported_with_their_names(tmp_path: Path) -> None:
    variants = {
        "plain": Variant(),
        "typo": Variant(overrides=["schedule.peak_rl=1e-3"]),
        "odd": Variant(overrides=["train.microbatch=3"]),
    }
    text = refusal(study(tmp_path / "new", variants=variants))
    assert (
        "typo: schedule.peak_rl = 1e-3: there is no such setting; nearest: schedule.peak_lr" in text
    )
    assert "odd: train.microbatch = 3: must divide 4" in text
    assert "plain" not in text
    assert not (tmp_path / "new").exists()


def test_a_problem_of_the_base_is_reported_once(tmp_path: Path) -> None:
    text = refusal(study(tmp_path, base=[*TINY, "model.hidden_size=-1"]))
    assert text.count("model.hidden_size = -1") == 1
    assert "every variant: model.hidden_size" in text


def test_runs_are_paired_where_model_and_batches_are_the_same(tmp_path: Path) -> None:
    two = "train.phases=[{name: a}, {name: b, start: 50%, PART}]"
    variants = {
        "plain": Variant(),
        "rate": Variant(overrides=["schedule.peak_lr=2e-3"]),
        "phases": Variant(overrides=[two.replace(", PART", "")]),
        "phases_and_rate": Variant(overrides=[two.replace("PART", "constant_lr: 1e-4")]),
        "batch": Variant(overrides=["train.global_batch=8"]),
        "model": Variant(overrides=["model.pattern=ME*-"]),
    }
    jobs = {run.variant: run.job for run in runs_of(study(tmp_path, variants=variants, seeds=(1,)))}
    assert {name for name, job in jobs.items() if are_paired(job, jobs["plain"])} == {
        "plain",
        "rate",
    }
    assert are_paired(jobs["phases"], jobs["phases_and_rate"])


def test_a_run_of_other_settings_is_not_taken_for_one_of_the_study(tmp_path: Path) -> None:
    job = runs_of(study(tmp_path))[1].job
    frozen.freeze(job, Path(job.run_dir))
    assert (
        len(runs_of(study(tmp_path, overrides=["train.tokens=5120"]))) == 6
    )  # nothing was trained
    (Path(job.run_dir) / "metrics.jsonl").write_text('{"step": 1, "tokens": 256}\n')
    assert len(runs_of(study(tmp_path))) == 6
    text = refusal(study(tmp_path, overrides=["train.tokens=5120"]))
    assert "train.tokens: 2560 there, 5120 here (fast seed 1)" in text
    assert "slow" not in text


def test_a_run_is_finished_when_its_metrics_reach_its_last_token(tmp_path: Path) -> None:
    run = runs_of(study(tmp_path))[0]
    assert not run.is_finished()
    log = JsonLines(run.folder / "metrics.jsonl")
    log.log(1, {"tokens": 2304, "loss": 6.0})
    assert not run.is_finished()
    log.log(2, {"tokens": 2560, "loss": 6.0})
    log.close()
    assert run.is_finished()


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"baseline": "plian"}, "baseline"),
        ({"only": ["fats"]}, "only"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": ()}, "seeds"),
        ({"parallel": 0}, "parallel"),
        ({"base": [*TINY, "train.seed=3"]}, "base"),
        ({"overrides": ["run_dir=elsewhere"]}, "overrides"),
        ({"variants": {"plain": Variant(), "a/b": Variant()}}, "variants.a/b"),
        ({"variants": {"plain": Variant(), "a" * 300: Variant()}}, f"variants.{'a' * 300}"),
        ({"variants": {"plain": Variant(), "Plain": Variant()}}, "variants.Plain"),
        ({"variants": {"plain": Variant(), "study.md": Variant()}}, "variants.study.md"),
        ({"variants": {"plain": Variant(), "Plots": Variant()}}, "variants.Plots"),
        ({"variants": {}}, "baseline"),
        ({"only": ["fast", "fast"]}, "only"),
        ({"longer": ["fats"]}, "longer"),
        ({"short_form": ShortForm(only=["fats"])}, "short_form.only"),
        ({"variants": {"plain": Variant(), "a": Variant(against="b")}}, "variants.a.against"),
        ({"variants": {"plain": Variant(), "a": Variant(against="a")}}, "variants.a.against"),
        ({"variants": {"plain": Variant(against="a"), "a": Variant()}}, "variants.plain.against"),
        (
            {"variants": {"plain": Variant(overrides=["runtime.threads=2"])}},
            "variants.plain.overrides",
        ),
    ],
    ids=str,
)
def test_what_makes_no_study_is_named(tmp_path: Path, changes: dict[str, Any], path: str) -> None:
    assert [problem.path for problem in collect(study(tmp_path, **changes))] == [path]


def test_a_seed_and_a_setting_that_a_run_would_refuse_are_refused(
    tmp_path: Path,
) -> None:
    text = refusal(study(tmp_path, overrides=["schedule.peak_rl=1"]))
    assert "every variant: schedule.peak_rl" in text
    with pytest.raises(ConfigError, match=r"seeds\.1 = -2: must be at least 0"):
        compose.compose("study", ["name=precision", "seeds=[1,-2]"])


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "fast" / "seed_2").mkdir(parents=True)
    (tmp_path / "fast" / "seed_2" / "letter.txt").touch()
    assert f"{tmp_path}/fast/seed_2: is not empty and no run folder" in refusal(study(tmp_path))
    (tmp_path / "slow").touch()
    assert f"{tmp_path}/slow is a file, not a folder" in refusal(study(tmp_path))
    run = tmp_path / "run"
    frozen.freeze(compose.compose("train", TINY), run)
    assert f"run_dir = {run}: is the folder of a run" in refusal(study(run))


def test_runs_get_folders_with_any_letters(tmp_path: Path) -> None:
    run = runs_of(study(tmp_path / "läuft, a=1", seeds=(1,)))[0]
    assert compose.compose("train", run.lines).run_dir == f"{tmp_path}/läuft, a=1/plain/seed_1"


def test_a_study_is_refused_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refusal(study(tmp_path))


@pytest.mark.slow
def test_every_study_that_is_ready_can_run(tmp_path: Path) -> None:
    files = sorted((compose.conf_dir() / "study").glob("*.yaml"))
    assert files
    for file in files:
        job = compose.compose("study", [f"name={file.stem}", f"run_dir={tmp_path}"])
        assert isinstance(job, StudyJob)
        assert len(runs_of(job)) == len(job.variants) * len(job.seeds)


def test_a_wrong_name_of_a_study_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"name = precison: .*nearest: precision"):
        compose.compose("study", ["name=precison"])


def test_a_layout_of_several_processes_is_checked_for_as_many(tmp_path: Path) -> None:
    split = ["parallel.context=2", "train.microbatch=1"]
    variants = {"plain": Variant(), "split": Variant(overrides=split, processes=2)}
    runs = runs_of(study(tmp_path, variants=variants, seeds=(3,)))
    assert [run.processes for run in runs] == [1, 2]
    variants["split"].processes = 1
    assert "needs a multiple of 2 processes, not 1" in refusal(study(tmp_path, variants=variants))
