"""A sweep runs what it can, and ends with a table."""

import json
import sys
from pathlib import Path

import pytest

from hybrid_train.jobs import sweep
from hybrid_train.jobs.multirun import SweepRun
from tests.unit.jobs.synthetic_run import make


def test_a_sweep_goes_on_after_a_failed_run_and_tells_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [
        SweepRun([sys.executable, "-c", f"raise SystemExit({code})"], {}) for code in (0, 3, 0, 4)
    ]
    assert sweep.run_all(runs) == 3
    assert "these runs failed: 1 (exit code 3), 3 (exit code 4)" in capsys.readouterr().err


def test_a_sweep_ends_with_a_line_a_run_the_best_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for seed, shift, code in ((1, 0.5, 0), (2, 0.0, 0), (3, 0.0, 1)):
        folder = tmp_path / f"seed={seed}"
        if not code:
            metrics = make(folder, steps=30, start=1_700_000_000.0) / "metrics.jsonl"
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            lines[-1]["validation_loss"] += shift
            metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        words = [sys.executable, "-c", f"raise SystemExit({code})"]
        runs.append(SweepRun(words, {"train.seed": str(seed)}, folder))
    assert sweep.run_all(runs) == 1
    said = capsys.readouterr()
    _, head, *lines = said.out.splitlines()
    assert head.split() == ["seed", "state", "step", "avg", "loss", "val", "loss", "folder"]
    assert lines[0].split() == ["2", "finished", "30", "2.9562", "2.9529", f"{tmp_path}/seed=2"]
    assert lines[1].split() == ["1", "finished", "30", "2.9562", "3.4529", f"{tmp_path}/seed=1"]
    assert lines[2].split()[:5] == ["3", "failed,", "exit", "code", "1"]
    assert f"hybrid-train report run_dir={tmp_path}" in said.out
    assert "these runs failed: seed=3 (exit code 1)" in said.err
