"""Every finished run of a study is asked the same, and what it says is described over seeds."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.config import frozen
from hybrid_train.jobs import study_evaluation
from hybrid_train.jobs.study_evaluation import PlannedEvaluation
from hybrid_train.jobs.study_plan import PlannedRun, StudyPlan, plan_study
from hybrid_train.schema import formats
from hybrid_train.schema.problems import ConfigError, UserError, collect
from hybrid_train.schema.study import ShortForm, Stage, StudyJob, Variant
from hybrid_train.tracking.jsonl import FILE_NAME

LENGTH = 1024
ASKED = ["tasks=[heldout,copying]", "task.heldout.tokens=400"]


@pytest.fixture(autouse=True)
def outside_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def study(folder: Path, **more: Any) -> StudyJob:
    values: dict[str, Any] = {
        "base": ["experiment=tiny_cpu", f"train.tokens={LENGTH}"], "baseline": "plain",
        "variants": {"plain": Variant(), "few": Variant(evaluate=["limit=4"])},
        "seeds": [1, 2], "evaluate": ASKED, "run_dir": str(folder / "study"),
        "stages_dir": str(folder / "kept"),
    }  # fmt: skip
    return StudyJob(title="Asked", **{**values, **more})


def evaluations(planned: StudyPlan) -> dict[str, PlannedEvaluation]:
    return {one.run: one for one in planned.evaluations()}


def end(run: PlannedRun) -> None:
    """Have a run end, with a checkpoint."""
    folder = run.folder
    (folder / "checkpoints").mkdir(parents=True)
    assert run.job is not None
    frozen.freeze(run.job, folder)
    (folder / FILE_NAME).write_text(json.dumps({"step": 1, "tokens": LENGTH, "loss": 1.0}) + "\n")


def result(one: PlannedEvaluation, task: str, figures: dict[tuple[str, str], float]) -> None:
    """Write a result as `evaluate` does: metrics and groups, with values."""
    one.folder.mkdir(parents=True, exist_ok=True)
    listed = [{"metric": m, "group": g, "value": value} for (m, g), value in figures.items()]
    stamp = {formats.KEY: formats.EVALUATION.stamp()}
    (one.folder / f"{task}.json").write_text(json.dumps({**stamp, "task": task, "figures": listed}))


def test_settings_of_the_study_come_first_and_those_of_a_variant_behind(tmp_path: Path) -> None:
    found = evaluations(plan_study(study(tmp_path)))
    assert set(found) == {f"{name} seed {seed}" for name in ("plain", "few") for seed in (1, 2)}
    run = tmp_path / "study" / "few" / "seed_2"
    places = [f"checkpoint=[{run}]", f"output={run}.evaluation"]
    assert found["few seed 2"].lines == [*ASKED, "limit=4", *places]
    assert found["plain seed 1"].settings == ASKED
    assert plan_study(study(tmp_path, evaluate=[])).evaluations() == []


def test_the_short_form_has_the_last_word(tmp_path: Path) -> None:
    form = ShortForm(overrides=["train.tokens=512"], evaluate=["limit=1"])
    short = study(tmp_path, short=True, short_form=form).as_asked()
    found = evaluations(plan_study(short))
    assert found["few seed 1"].settings == [*ASKED, "limit=4", "limit=1"]


def test_what_cannot_be_asked_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_study(study(tmp_path, evaluate=["tasks=heldot"]))
    assert "evaluate: tasks = heldot: is no task" in str(refused.value)


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"evaluate": ["tasks=sums", "output=here"]}, "evaluate"),
        ({"evaluate": [], "figures": ["sums.accuracy"]}, "figures"),
        ({"variants": {"plain": Variant(evaluate=["checkpoint=a"])}}, "variants.plain.evaluate"),
        ({"evaluate": ["tasks=heldout", "against={parent}"]}, "evaluate"),
    ],
)
def test_what_is_no_question_is_named(tmp_path: Path, more: dict[str, Any], path: str) -> None:
    assert path in {problem.path for problem in collect(study(tmp_path, **more))}


def test_runs_may_be_compared_with_a_stage(tmp_path: Path) -> None:
    parent = Stage(overrides=["experiment=tiny_cpu", f"train.tokens={LENGTH}"])
    job = study(tmp_path, evaluate=[*ASKED, "against={parent}"], stages={"parent": parent})
    planned = plan_study(job)
    (stage,) = planned.stages
    assert f"against={stage.path}" in evaluations(planned)["plain seed 1"].settings
    assert all(run.stages() == {stage.digest: stage} for run in planned.runs)


def test_results_of_other_settings_are_none_of_these(tmp_path: Path) -> None:
    one = evaluations(plan_study(study(tmp_path)))["plain seed 1"]
    result(one, "heldout", {("loss", ""): 2.5})
    assert not one.is_finished()  # as if it had been killed before the next task
    assert list(one.figures()) == []
    one.finish(1.0)
    assert one.is_finished()
    other = evaluations(plan_study(study(tmp_path, evaluate=[*ASKED, "seed=7"])))["plain seed 1"]
    assert other.mark == one.mark
    assert not other.is_finished()


def test_a_run_that_has_ended_unasked_is_refused_where_its_checkpoint_is_gone(
    tmp_path: Path,
) -> None:
    run = plan_study(study(tmp_path)).runs[0]
    end(run)
    plan_study(study(tmp_path))  # it can still be asked
    (run.folder / "checkpoints").rmdir()
    with pytest.raises(UserError, match=r"seed_1: .*cannot be asked .*tasks=\[heldout,copying\]"):
        plan_study(study(tmp_path))


def test_figures_are_described_over_the_seeds_of_a_variant(tmp_path: Path) -> None:
    found = evaluations(plan_study(study(tmp_path)))
    for seed, loss in ((1, 2.0), (2, 2.5)):
        one = found[f"plain seed {seed}"]
        result(one, "heldout", {("loss", ""): loss, ("loss", "position=0-3"): loss + 1})
        result(one, "copying", {("score", ""): 0.25})
        one.finish(1.0)
    plain = study_evaluation.over_seeds([found[f"plain seed {seed}"] for seed in (1, 2)])
    spread = plain["heldout.loss", ""]
    assert (spread.mean, spread.number) == (2.25, 2)
    assert spread.deviation == pytest.approx(statistics.stdev([2.0, 2.5]))
    data = study_evaluation.as_data(plain)
    assert data["heldout.loss"]["position=0-3"]["highest"] == 3.5
    rows = study_evaluation.rows({"plain": plain, "few": {}})
    assert rows == [
        ("copying.score", "-", "0.2500 \u00b1 0.0000", "-"),
        ("heldout.loss", "position=0-3", "3.2500 \u00b1 0.3536", "-"),
    ]
    few = study_evaluation.of_metrics(plain, ["copying.score"])
    assert study_evaluation.rows({"plain": few}) == [rows[0][:3]]


def test_large_figures_are_shown_without_digits_that_say_nothing() -> None:
    from hybrid_train.tracking.gaps import spread

    values = {("a.b", ""): spread([123456.7]), ("a.c", ""): spread([812.34, 812.36])}
    shown = study_evaluation.rows({"one": values})
    assert [row[2] for row in shown] == ["123457", "812.4 \u00b1 0.0"]
