"""`hybrid-train status`: for people and for scripts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_train.jobs import status
from hybrid_train.schema.job_roots import StatusJob
from tests.unit.jobs.synthetic_run import PROVENANCE, make

START = 1_700_000_000.0


def printed(capsys: pytest.CaptureFixture[str], folder: Path, *, json: bool = False) -> str:
    status.run(StatusJob(run_dir=[str(folder)], json=json))
    return capsys.readouterr().out


def test_people_read_state_progress_and_attempts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, make(tmp_path, steps=30, start=START))
    assert "state         finished" in text
    assert "step 30, 7.68k of 7.68k tokens (100.0%)" in text
    assert "loss 2.9029" in text  # 3 + 5 exp(-8) + sin(30) / 10
    assert "smoothed_loss 2.9562" in text  # the mean of that and of those of steps 28 and 29
    assert "checkpoint    none yet" in text
    assert "failed, killed" in text
    assert "8 on 2 nodes" in text
    assert "step 15: reason spike" in text
    # 30 steps of half a second; 165 s are three attempts with ten seconds more and two pauses.
    assert "goodput       8.8% of 2m45s" in text
    assert "72.7%  2m00s  between attempts" in text


def test_the_newest_attempt_says_what_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, steps=30, start=START)
    text = " ".join(printed(capsys, folder).split())
    assert "hybrid_train 0.1.0, commit 0123456789ab, changed since; working folder of no" in text
    assert "2 x 96 cores a processor, 2 TB, 4 x a GPU (80 GB)" in text
    assert "libraries python 3.12.1, torch 2.11.0 " in text
    (attempt, *_) = json.loads(printed(capsys, folder, json=True))["attempts"]
    assert attempt["provenance"] == PROVENANCE
    history = folder / "history.jsonl"  # as of a run folder of format 1
    history.write_text(history.read_text().replace('"provenance"', '"something"'))
    assert "commit" not in printed(capsys, folder)


def test_scripts_read_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path, steps=30, start=START, outcome="stopped")
    lines = (folder / "metrics.jsonl").read_text().replace('"lr": 0.001', '"lr": null')
    (folder / "metrics.jsonl").write_text(lines)
    data = json.loads(printed(capsys, folder, json=True))
    assert (data["state"], data["running"], data["step"]) == ("stopped", False, 30)
    assert data["metrics"]["lr"] is None
    assert data["goodput"]["share"] == pytest.approx(14.5 / 165)  # one of the steps was skipped
    assert [one["outcome"] for one in data["attempts"]] == ["failed", "failed", "stopped"]
    assert data["checkpoint"] is None


def test_of_several_runs_each_has_a_line_and_failures_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, outcome in (("lr=10", "finished"), ("lr=2", "failed")):
        make(tmp_path / name, steps=30, start=START, outcome=outcome)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("[")
    head, first, second, *rest = printed(capsys, tmp_path).splitlines()
    heads = ["run", "state", "step", "tokens", "avg", "loss", "val", "loss", "tok/s", "left"]
    assert head.split() == heads
    line = ["30", "7.68k", "2.9562", "2.9529", "512", "-"]
    assert first.split() == ["lr=2", "failed", *line]
    assert second.split() == ["lr=10", "finished", *line]
    assert first.index("7.68k") == second.index("7.68k")
    assert any(line.startswith("lr=2 failed: rank 3 was killed") for line in rest)
    assert any(line.startswith("damaged is left out: ") for line in rest)


def test_scripts_read_several_runs_as_a_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        make(tmp_path / name, steps=3, start=START)
    data = json.loads(printed(capsys, tmp_path, json=True))
    assert [one["step"] for one in data["runs"]] == [3, 3]
    assert data["left_out"] == {}


def test_torch_is_not_needed(tmp_path: Path) -> None:
    make(tmp_path, steps=3, start=START)
    code = (
        "import sys; from hybrid_train.jobs.cli import main; "
        f"code = main(['status', 'run_dir={tmp_path}']); "
        "sys.exit(code or 'torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
