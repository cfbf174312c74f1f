"""What an attempt leaves behind, and what is made of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_train.jobs import attempts
from hybrid_train.jobs.attempts import Attempt
from hybrid_train.schema.problems import UserError
from hybrid_train.tracking import exit_reports, history


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    history.note(
        tmp_path, history.ATTEMPT, at=1e9, attempt=1, step=0, processes=2, nodes=1, host="a",
        job=None, restart=0,
    )  # fmt: skip
    exit_reports.folder(tmp_path, 1).mkdir(parents=True)
    return tmp_path


def alive(run_dir: Path, pid: int, started: str | None) -> None:
    me = {"host": socket.gethostname(), "pid": pid, "started": started, "job": None}
    (run_dir / attempts.ALIVE).write_text(json.dumps(me))


def test_a_signal_does_not_take_the_place_of_what_really_happened(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    here = Attempt(run_dir, 1)
    here.failed(ValueError("a mistake"))
    here.leave(exit_reports.TOLD, "rank 1 was told to end by SIGTERM")
    (report,) = exit_reports.read(run_dir, 1)
    assert (report.kind, report.text) == ("error", "ValueError: a mistake")


def test_the_end_of_an_attempt_is_explained_once(run_dir: Path) -> None:
    attempts.conclude(run_dir)
    attempts.conclude(run_dir)
    (attempt,) = history.attempts(history.read(run_dir))
    assert (attempt.outcome, attempt.kind, attempt.ranks) == ("failed", "killed", (0, 1))
    assert len([one for one in history.read(run_dir) if one["event"] == history.END]) == 1


def test_a_run_that_turns_out_to_be_complete_is_finished_and_its_end_stays_where_it_was(
    run_dir: Path,
) -> None:
    attempts.conclude(run_dir)
    (failed,) = history.attempts(history.read(run_dir))
    attempts.complete(run_dir)
    attempts.complete(run_dir)
    (attempt,) = history.attempts(history.read(run_dir))
    assert (attempt.outcome, attempt.kind) == ("finished", "finished")
    assert attempt.end == failed.end
    assert attempt.cause == f"all tokens are trained; the attempt ended as killed: {failed.cause}"
    assert len([one for one in history.read(run_dir) if one["event"] == history.END]) == 2


def test_a_living_process_keeps_its_folder_and_a_dead_one_does_not(run_dir: Path) -> None:
    ours = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    alive(run_dir, os.getpid(), ours)
    with pytest.raises(UserError, match=f"is in use: process {os.getpid()} on"):
        attempts.require_alone(run_dir)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive(run_dir, gone.pid, "1")
    attempts.require_alone(run_dir)
    alive(run_dir, os.getpid(), "1")  # another process had that number before us
    attempts.require_alone(run_dir)
