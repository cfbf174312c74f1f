"""metrics.jsonl: one line a step, also after a kill, a resume and a full disk."""

import json
import math
from pathlib import Path

import pytest

from hybrid_train.schema.problems import UserError
from hybrid_train.tracking.jsonl import JsonLines, read_metrics


def write(path: Path, steps: range, resume_step: int = 0, loss: float = 1.0) -> None:
    lines = JsonLines(path, resume_step)
    for step in steps:
        lines.log(step, {"tokens": 100 * step, "loss": loss})
    lines.close()


def test_what_is_logged_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new_folder" / "metrics.jsonl"
    write(path, range(1, 3), loss=0.1)
    assert read_metrics(path) == [
        {"step": 1, "tokens": 100, "loss": 0.1},
        {"step": 2, "tokens": 200, "loss": 0.1},
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log(1, {"loss": 2.0})
    assert len(read_metrics(path)) == 1
    lines.close()


def test_resume_drops_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8), loss=1.0)  # killed at step 7; the last checkpoint is of step 5
    write(path, range(6, 9), resume_step=5, loss=2.0)
    found = read_metrics(path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["loss"] for line in found] == [1.0] * 5 + [2.0] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_kept_lines_are_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), loss=1 / 3)
    before = path.read_bytes()
    JsonLines(path, resume_step=3).close()
    assert path.read_bytes() == before


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert len(read_metrics(path)) == 3
    write(path, range(4, 5), resume_step=3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_a_fresh_start_forgets_a_run_that_never_saved(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 2), resume_step=0)
    assert [line["step"] for line in read_metrics(path)] == [1]


@pytest.mark.parametrize("damage", ["not json", "[1]", "3"])
def test_a_damaged_line_is_an_error_with_its_number(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        JsonLines(path, resume_step=3)


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log(1, {"loss": math.nan, "grad_norm": math.inf})
    lines.close()
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "grad_norm": None}
    assert math.isnan(read_metrics(path)[0]["loss"])


def test_a_step_is_logged_once(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", resume_step=4)
    lines.log(5, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 5 comes after step 5; log a step once"):
        lines.log(5, {"validation_loss": 1.0})
    lines.close()


def test_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="'lss' is no metric"):
        lines.log(1, {"lss": 1.0})
    lines.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.close()
    lines._file = Path("/dev/full").open("w")  # noqa: SIM115 - a real full disk
    with pytest.raises(UserError, match="No space left on device; make room"):
        lines.log(1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        lines.close()  # the line is still in its buffer


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run folder should be")
    with pytest.raises(UserError, match="cannot write"):
        JsonLines(tmp_path / "run" / "metrics.jsonl")
