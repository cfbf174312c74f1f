"""A study chooses a learning rate for each kind of objective, once, and keeps to it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.jobs.study_plan import StudyPlan, choose_rates, plan_study, written_rates
from hybrid_train.schema import formats
from hybrid_train.schema.problems import ConfigError, UserError, collect
from hybrid_train.schema.study import RateChoice, Stage, StudyJob, Variant
from hybrid_train.schema.units import tokens
from hybrid_train.tracking.jsonl import FILE_NAME

RATES = [1e-3, 2e-3, 4e-3]
LENGTH = 4096


@pytest.fixture(autouse=True)
def outside_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def study(folder: Path, **more: Any) -> StudyJob:
    variants = {
        "plain": Variant(),
        "wide": Variant(overrides=["model.hidden_size=32"]),
        "fixed": Variant(overrides=["schedule.peak_lr=7e-3"]),
    }
    values: dict[str, Any] = {
        "base": ["experiment=tiny_cpu", f"train.tokens={LENGTH}"], "baseline": "plain",
        "variants": variants, "rates": RateChoice(candidates=RATES), "seeds": [1, 2],
        "run_dir": str(folder / "study"), "stages_dir": str(folder / "kept"),
    }  # fmt: skip
    return StudyJob(title="Chosen", **{**values, **more})


def end(planned: StudyPlan, losses: list[float | None]) -> None:
    """Have the trials end with losses; None: it failed."""
    for trial, loss in zip(planned.trials, losses, strict=True):
        if loss is not None:
            trial.stage.path.mkdir(parents=True)
            line = {"step": 1, "tokens": trial.tokens, "loss": None if math.isnan(loss) else loss}
            (trial.stage.path / FILE_NAME).write_text(json.dumps(line) + "\n")
            trial.stage.finish(1.0)


def chosen(job: StudyJob, losses: list[float | None]) -> StudyPlan:
    planned = plan_study(job)
    end(planned, losses)
    choose_rates(job, planned.trials)
    return plan_study(job)


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyPlan]:
    """A folder whose study has chosen, and its plan since."""
    folder = tmp_path_factory.mktemp("decided")
    return folder, chosen(study(folder), [3.0, 2.0, 2.5])


def rates_of(planned: StudyPlan) -> dict[str, float | None]:
    return {run.variant: run.job and run.job.schedule.peak_lr for run in planned.runs}


def test_the_first_variant_of_a_kind_tries_every_rate_with_another_seed(tmp_path: Path) -> None:
    planned = plan_study(study(tmp_path))
    jobs = [trial.stage.job for trial in planned.trials]
    assert [job.schedule.peak_lr for job in jobs] == RATES
    assert {job.model.hidden_size for job in jobs} == {64}
    assert {tokens(job.train.tokens) for job in jobs} == {LENGTH // 4}
    assert {job.train.seed for job in jobs} == {0}
    assert rates_of(planned) == {"plain": None, "wide": None, "fixed": 7e-3}
    assert not (tmp_path / "study").exists()


def test_the_lowest_loss_chooses_for_all_but_those_that_name_a_rate(
    decided: tuple[Path, StudyPlan],
) -> None:
    _, planned = decided
    assert rates_of(planned) == {"plain": 2e-3, "wide": 2e-3, "fixed": 7e-3}
    assert not planned.trials
    assert not planned.stages
    said = planned.rates["next_token"].sentence("next_token")
    assert "Rate of next_token: 0.002, by the losses after 1024 tokens with seed 0" in said
    assert "may lie beyond" not in said


@pytest.mark.parametrize("lost", [None, math.nan])
def test_a_rate_that_fails_is_out_and_one_at_the_end_is_said(
    tmp_path: Path, lost: float | None
) -> None:
    planned = chosen(study(tmp_path), [lost, 2.0, 1.5])
    assert rates_of(planned)["plain"] == 4e-3
    said = planned.rates["next_token"].sentence("next_token")
    assert "0.001: failed" in said
    assert "it is the largest that was tried, a better one may lie beyond" in said


def test_where_every_rate_fails_their_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rate of next_token was trained with to the end"):
        chosen(study(tmp_path), [None, None, None])
    assert not (tmp_path / "study").exists()


def test_what_was_chosen_stays_when_the_trials_are_gone(
    decided: tuple[Path, StudyPlan], tmp_path: Path
) -> None:
    planned = plan_study(study(decided[0], stages_dir=str(tmp_path / "elsewhere")))
    assert rates_of(planned)["plain"] == 2e-3
    assert not planned.trials


@pytest.mark.parametrize(
    "change",
    [
        {"rates": RateChoice(candidates=[1e-3, 2e-3])},
        {"base": ["experiment=tiny_cpu", f"train.tokens={LENGTH}", "schedule=cosine"]},
    ],
)
def test_other_trials_choose_anew(decided: tuple[Path, StudyPlan], change: dict[str, Any]) -> None:
    assert len(plan_study(study(decided[0], **change)).trials) >= 2


def test_another_study_finds_the_trials_ended(
    decided: tuple[Path, StudyPlan], tmp_path: Path
) -> None:
    other = plan_study(study(decided[0], run_dir=str(tmp_path / "other")))
    stages, _ = other.of_trials().todo()
    assert len(other.trials) == 3
    assert stages == []


def test_a_trial_waits_for_the_parent_that_it_starts_from(tmp_path: Path) -> None:
    parent = Stage(overrides=["experiment=tiny_cpu", "train.seed={seed}"])
    variants = {"plain": Variant(overrides=["checkpoint.load={parent}"])}
    planned = plan_study(study(tmp_path, stages={"parent": parent}, variants=variants))
    names = [one.name for one in planned.of_trials().stages]
    kind = "next_token from trained weights"
    assert names == ["parent seed 0", *(f"rate {rate} of {kind}" for rate in RATES)]
    assert {stage.name for stage in planned.stages} > {"parent seed 1", "parent seed 2"}


def test_runs_that_begin_with_trained_weights_try_rates_of_their_own(tmp_path: Path) -> None:
    load = ["checkpoint.load={parent}", "checkpoint.load_only=weights"]
    variants = {"plain": Variant(), "healed": Variant(overrides=load)}
    parent = Stage(overrides=["experiment=tiny_cpu"])
    job = study(tmp_path, stages={"parent": parent}, variants=variants)
    planned = chosen(job, [3.0, 2.0, 2.5, 2.0, 2.5, 3.0])
    assert {kind: one.chosen for kind, one in planned.rates.items()} == {
        "next_token": RATES[1], "next_token from trained weights": RATES[0],
    }  # fmt: skip


def test_a_rate_given_for_all_is_not_chosen(tmp_path: Path) -> None:
    planned = plan_study(study(tmp_path, overrides=["schedule.peak_lr=5e-3"]))
    assert set(rates_of(planned).values()) == {5e-3}
    assert not planned.trials


def test_a_variant_that_cannot_run_is_named_and_nothing_is_tried(tmp_path: Path) -> None:
    variants = {"plain": Variant(overrides=["train.tokens=nonsense"])}
    with pytest.raises(ConfigError, match=r"train\.tokens = nonsense"):
        plan_study(study(tmp_path, variants=variants))


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        (RateChoice(candidates=[1e-3]), "must be two or more rates"),
        (RateChoice(candidates=[1e-3, 1e-3]), "must be two or more rates"),
        (RateChoice(candidates=RATES, seed=2), "needs a seed that is not reported"),
        (RateChoice(candidates=RATES, share=0), "must be more than 0"),
        (RateChoice(candidates=[1e-3, math.nan]), "must be a number"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(
    tmp_path: Path, rates: RateChoice, said: str
) -> None:
    assert said in "\n".join(map(str, collect(study(tmp_path, rates=rates))))


def test_rates_of_before_there_were_numbers_stay_and_newer_ones_are_refused(
    decided: tuple[Path, StudyPlan], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(decided[0], tmp_path / "copy"))
    path = folder / "study" / "rates.json"
    said = json.loads(path.read_text())
    stamp = said.pop(formats.KEY)
    assert stamp == formats.RATES.stamp()
    path.write_text(json.dumps(said))
    assert written_rates(path.parent)
    path.write_text(json.dumps(said | {formats.KEY: stamp | {"version": 3}}))
    with pytest.raises(UserError, match=r"learning rates of a study, format 3\).*upgrade"):
        written_rates(path.parent)


def test_a_damaged_file_of_rates_is_named(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "rates.json").write_text('{"next_token": {"chosen"')
    with pytest.raises(UserError, match=r"rates\.json: this is not what a study wrote there"):
        plan_study(study(tmp_path))


def test_each_variant_tries_the_rates_where_their_models_want_their_own(tmp_path: Path) -> None:
    job = study(tmp_path, rates=RateChoice(candidates=RATES, each=True))
    tried = plan_study(job).trials
    assert [(one.kind, one.rate) for one in tried] == [
        (name, rate) for name in ("plain", "wide") for rate in RATES
    ]
    planned = chosen(job, [3.0, 2.0, 4.0, 2.0, 3.0, 4.0])
    rates = {run.variant: run.job.schedule.peak_lr for run in planned.runs if run.job}
    assert rates == {"plain": RATES[1], "wide": RATES[0], "fixed": 7e-3}
