"""Who may train in a folder: its own run, and any other as long as nothing was trained there."""

import copy
import json
from pathlib import Path

import pytest

from hybrid_train.config import compose, frozen
from hybrid_train.jobs import run_folder
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.tracking import history
from tests.unprivileged import modes_count

TINY = compose.compose("train", ["experiment=tiny_cpu"])


def job(run_dir: Path, seed: int = 1234, pattern: str = TINY.model.pattern) -> TrainJob:
    changed = copy.deepcopy(TINY)
    changed.run_dir, changed.train.seed, changed.model.pattern = str(run_dir), seed, pattern
    return changed


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """The folder of a run that was killed before its first step."""
    run_dir = tmp_path / "run"
    frozen.freeze(job(run_dir), run_dir)
    history.note(
        run_dir, history.ATTEMPT, attempt=1, step=0, processes=1, nodes=1, host="a", job=None,
        restart=0,
    )  # fmt: skip
    (run_dir / "attempts" / "0001").mkdir(parents=True)
    (run_dir / "tokenizer").mkdir()
    (run_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    (run_dir / "checkpoints" / "step_00000001.partial").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "lo')  # cut short
    return run_dir


def test_an_untrained_folder_is_taken_over_and_that_is_said(
    started: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = job(started, seed=7, pattern="M-M")
    with caplog.at_level("WARNING"):
        run_folder.require_same_run(other)
    assert f"nothing was trained in {started}: this run takes the folder over" in caplog.text
    assert "model.pattern" in caplog.text
    run_folder.take_over(other)
    noted = history.read(started)[-1]
    assert noted["event"] == "taken over"
    assert "train.seed: 1234 before" in noted["changes"]
    assert not (started / "tokenizer").exists()  # that of the other run
    assert (started / "attempts" / "0001").is_dir()


@pytest.mark.parametrize("lost", ["config.yaml", "half of config.yaml", "old config.yaml"])
def test_a_start_that_was_cut_off_is_taken_over(lost: str, started: Path) -> None:
    config = started / "config.yaml"
    if lost == "config.yaml":
        config.unlink()
    else:
        config.write_text("train: {tok" if lost.startswith("half") else "no_such_setting: 1\n")
    run_folder.require_same_run(job(started))
    run_folder.take_over(job(started))


@pytest.mark.parametrize(
    "value",
    [
        "metrics.jsonl",
        "checkpoints/step_00000004",
        "checkpoints/step_00000004.damaged",
        "notes.txt",
    ],
)
def test_a_folder_with_something_of_value_is_refused(value: str, started: Path) -> None:
    place = started / value
    if place.suffix in (".jsonl", ".txt"):
        place.write_text(json.dumps({"step": 1, "loss": 6.0}) + "\n")
    else:
        place.mkdir()
    with pytest.raises(UserError, match="belongs to a run with another config"):
        run_folder.require_same_run(job(started, seed=7))
    run_folder.take_over(job(started, seed=7))
    assert (started / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["letter.txt", "tokenizer", "checkpoints"])
def test_a_folder_of_something_else_is_no_run_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="is not a run folder"):
        run_folder.require_same_run(job(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        *(".", "config.yaml", "metrics.jsonl", "history.jsonl", "tokenizer"),
        "checkpoints/step_00000001.partial",
    ],
)
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_what_may_not_be_read_or_written_is_named(name: str, mode: int, started: Path) -> None:
    place = started / name
    before = place.stat().st_mode
    place.chmod(mode)
    try:
        with modes_count(), pytest.raises(UserError) as refusal:
            run_folder.require_access(started)
    finally:
        place.chmod(before)
    assert f"run_dir = {started}: this user may not read and write {place}" in str(refusal.value)
    with modes_count():
        run_folder.require_access(started)
