"""Whether a job is queued again, from what its run folder says; needs no SLURM."""

import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.tracking import history
from tests.jobs.command import ROOT

FINISHED, GIVE_UP, QUEUE_AGAIN = 0, 1, 75
BEGAN = 1_000_000.0  # of the start of the job that is judged


def judge(run_dir: Path, code: int, job: str = "7", limit: int = 3) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "launch" / "slurm" / "requeue.py"), str(run_dir)]
    command += ["--limit", str(limit), "--job", job, "--began", str(BEGAN), "--code", str(code)]
    done = subprocess.run(
        command,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.returncode, done.stdout


def attempt(run_dir: Path, outcome: str, step: int, at: float = BEGAN + 10) -> None:
    number = 1 + sum(event["event"] == "attempt" for event in history.read(run_dir))
    start = {"attempt": number, "step": 0, "processes": 2, "nodes": 2, "host": "n1", "job": "7"}
    history.note(run_dir, "attempt", at=at, **start)
    cause = {"finished": "all tokens are trained", "stopped": "SIGUSR1"}.get(outcome, "it fell")
    end = {"outcome": outcome, "kind": outcome, "cause": cause, "ranks": []}
    history.note(run_dir, "end", at=at + 1, attempt=number, step=step, **end)


def checkpoint(run_dir: Path, step: int) -> None:
    layout.path_of(run_dir, step).mkdir(parents=True)
    layout.write_position(layout.path_of(run_dir, step), {"step": step})


def names(run_dir: Path) -> list[str]:
    verdicts = ("queued again", "not queued again")
    return [event["event"] for event in history.read(run_dir) if event["event"] in verdicts]


def test_a_finished_run_is_done(tmp_path: Path) -> None:
    attempt(tmp_path, "finished", 40)
    assert judge(tmp_path, code=0)[0] == FINISHED
    assert names(tmp_path) == []


def test_a_run_that_stopped_on_a_signal_goes_on(tmp_path: Path) -> None:
    checkpoint(tmp_path, 12)
    attempt(tmp_path, "stopped", 12)
    code, said = judge(tmp_path, code=0)
    assert code == QUEUE_AGAIN
    assert "from step 12" in said


def test_a_run_that_was_complete_before_is_done_though_it_had_been_stopped(tmp_path: Path) -> None:
    attempt(tmp_path, "stopped", 40, at=BEGAN - 100)
    assert judge(tmp_path, code=0)[0] == FINISHED


def test_a_failure_after_an_earlier_finish_is_no_finish(tmp_path: Path) -> None:
    attempt(tmp_path, "finished", 40, at=BEGAN - 100)
    code, said = judge(tmp_path, code=1)
    assert code == QUEUE_AGAIN
    assert "no process of the run came as far as its history" in said


def test_three_ends_at_one_step_are_enough(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    attempt(tmp_path, "failed", 5)
    assert [judge(tmp_path, code=1)[0] for _ in range(3)] == [QUEUE_AGAIN, QUEUE_AGAIN, GIVE_UP]
    assert names(tmp_path) == ["queued again", "queued again", "not queued again"]
    assert "3 attempts in a row ended at step 5; the last: it fell" in str(history.read(tmp_path))


def test_progress_starts_the_count_again(tmp_path: Path) -> None:
    for step in (0, 0, 5, 5, 9, 9):
        if step and not layout.path_of(tmp_path, step).exists():
            checkpoint(tmp_path, step)
        assert judge(tmp_path, code=1)[0] == QUEUE_AGAIN


def test_a_job_that_is_submitted_again_starts_its_own_count(tmp_path: Path) -> None:
    for _ in range(3):
        judge(tmp_path, code=1)
    assert judge(tmp_path, code=1, job="8")[0] == QUEUE_AGAIN


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_counts_attempts(limit: int, tmp_path: Path) -> None:
    codes = [judge(tmp_path, code=1, limit=limit)[0] for _ in range(limit)]
    assert codes == [QUEUE_AGAIN] * (limit - 1) + [GIVE_UP]
