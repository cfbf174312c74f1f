"""The report of a study compares each variant with the one it names, and reads tokens saved."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.config import frozen
from hybrid_train.jobs.study_plan import plan_study
from hybrid_train.jobs.study_report import JSON, MARKDOWN, report
from hybrid_train.schema.study import StudyJob, Variant
from hybrid_train.tracking.jsonl import JsonLines

STEPS, TOKENS = 10, 256  # of a run, and of a step
# Losses by variant and seed, over training and in its validation alike.
LOSSES = {
    "labels": (4.0, 4.2),
    "twice": (3.5, 3.7),
    "taught": (3.75, 3.7),
    "wide": (3.2, 3.2),
    "harsh": (3.9, 3.774),
}


@pytest.fixture(autouse=True)
def outside_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def written(folder: Path, start: float | None = None, **more: Any) -> dict[str, Any]:
    """Finish every run of a study with made losses, report, and return its figures.

    Args:
        folder: of the study.
        start: loss of `taught` and `harsh` before the first step; None: nobody measured it.
        more: settings of the study.
    """
    job = StudyJob(
        title="Made",
        run_dir=str(folder),
        base=["experiment=tiny_cpu", f"train.tokens={STEPS * TOKENS}"],
        seeds=[1, 2],
        baseline="labels",
        variants={
            "labels": Variant(),
            "twice": Variant(overrides=[f"train.tokens={2 * STEPS * TOKENS}"]),
            "taught": Variant(),
            "wide": Variant(overrides=["model.hidden_size=128"]),
            "harsh": Variant(against="taught"),
        },
        **more,
    )
    planned = plan_study(job)
    for run in planned.runs:
        assert run.job is not None
        frozen.freeze(run.job, run.folder)
        log, loss = JsonLines(run.folder / "metrics.jsonl"), LOSSES[run.variant][run.seed - 1]
        steps = int(run.job.train.tokens) // TOKENS
        for step in range(1, steps + 1):
            line = {"tokens": step * TOKENS, "loss": loss, "validation_loss": loss}
            if step == 1 and start is not None and run.variant in ("taught", "harsh"):
                line["start_validation_loss"] = start + run.seed
            log.log(step, line)
        log.close()
    report(job, planned)
    found: dict[str, Any] = json.loads((folder / JSON).read_text())["variants"]
    return found


def test_a_variant_is_compared_with_the_one_that_it_names(tmp_path: Path) -> None:
    found = written(tmp_path)
    assert found["taught"]["against"] == "labels"
    assert found["taught"]["gaps"]["end"]["lowest"] == pytest.approx(3.7 / 4.2 - 1)
    assert found["harsh"]["against"] == "taught"
    gaps = [3.9 / 3.75 - 1, 3.774 / 3.7 - 1]
    assert found["harsh"]["gaps"]["end"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert found["harsh"]["validation_gap"]["highest"] == pytest.approx(gaps[0])
    assert found["taught"]["tokens_saved"] is None  # no longer baseline ran
    text = (tmp_path / MARKDOWN).read_text()
    assert "| harsh | taught | 2 |" in text
    assert "taught: loss 25 % 3.7250" in text


def test_losses_before_and_after_training_stand_side_by_side(tmp_path: Path) -> None:
    found = written(tmp_path / "measured", start=5.0)
    assert found["taught"]["start_validation_loss"]["mean"] == 6.5
    assert found["wide"]["start_validation_loss"]["mean"] is None
    text = (tmp_path / "measured" / MARKDOWN).read_text()
    assert "| before | after | published |" in text
    # From the end, since settings stand in a table behind that of losses.
    lines = [row.split(" | ") for row in reversed(text.splitlines())]
    rows = {line[0]: line[-3:-1] for line in lines}
    assert rows["| taught"] == ["6.5000", "3.7250"]
    assert rows["| wide"] == ["-", "3.2000"]
    written(tmp_path / "not")
    assert "before | after" not in (tmp_path / "not" / MARKDOWN).read_text()


def test_tokens_saved_are_read_between_the_baseline_and_a_longer_one(tmp_path: Path) -> None:
    found = written(tmp_path, longer=["twice"])
    # Seed 1: half of the fall to that of twice as many tokens; seed 2: all of it.
    expected = {"lowest": 1 - 2**-0.5, "highest": 0.5, "mean": (1 - 2**-0.5 + 0.5) / 2}
    saved = found["taught"]["tokens_saved"]
    assert {name: saved[name] for name in expected} == pytest.approx(expected)
    assert found["labels"]["tokens_saved"]["mean"] == 0
    assert found["wide"]["tokens_saved"] is None  # another model
    assert found["twice"]["tokens_saved"] is None  # other batches
    assert "| 40 (29 to 50) |" in (tmp_path / MARKDOWN).read_text()
