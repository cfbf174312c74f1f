"""Every attempt at a run is in its history, and only one is at work at a time."""

import time
from pathlib import Path
from signal import SIGKILL, SIGUSR1, SIGUSR2

import pytest

from hybrid_train.tracking import history
from tests.jobs.command import (
    TIMEOUT_S,
    arguments,
    contents,
    finish,
    last_step,
    metrics,
    signal_at_step,
    start,
    train,
)

pytestmark = pytest.mark.xdist_group("attempts")

LONG = "train.tokens=100k"


def attempts(run_dir: Path) -> list[history.Attempt]:
    return history.attempts(history.read(run_dir))


def test_the_history_tells_how_each_attempt_ended(tmp_path: Path, corpus: Path) -> None:
    run_dir, data = tmp_path / "run", f"data.folder={corpus}"
    killed = signal_at_step(SIGKILL, 7, run_dir, data, "checkpoint.interval=3", LONG)
    assert killed.code == -SIGKILL
    clock = train(run_dir, data, "checkpoint.interval=3", LONG, "recovery.time_limit_s=1")
    assert clock.code == 0, clock.err
    assert "recovery.time_limit_s=1 is over; the same command goes on" in clock.said
    ended = train(run_dir, data, "checkpoint.interval=3", f"train.tokens={last_step(run_dir)}01")
    assert ended.code == 0, ended.err
    first, second, *rest = attempts(run_dir)
    assert (first.outcome, first.kind, first.ranks) == (history.FAILED, "killed", (0,))
    assert first.start_step == 0
    assert second.start_step == first.end_step != 0
    assert (second.outcome, second.kind) == (history.STOPPED, "clock")
    assert len(rest) <= 1
    assert not list((run_dir / "attempts").rglob("*.json"))
    assert not list((run_dir / "attempts" / "0002").rglob("*"))


@pytest.mark.slow
def test_a_folder_in_use_is_refused_by_name_and_left_as_it_is(tmp_path: Path, corpus: Path) -> None:
    run_dir, command = tmp_path / "run", (f"data.folder={corpus}", LONG, "checkpoint.interval=0")
    working = start(*arguments(run_dir, *command), cold=True)  # it is to say its process id
    deadline = time.monotonic() + TIMEOUT_S
    while last_step(run_dir) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    refused = train(run_dir, *command)
    working.send_signal(SIGUSR2)  # says where it is, and goes on
    working.send_signal(SIGUSR1)
    stopped = finish(working)
    assert refused.code == 2
    assert f"is in use: process {working.pid} on " in refused.err
    assert stopped.code == 128 + SIGUSR1, stopped.err
    assert "in fit\n" in stopped.err
    assert [one.kind for one in attempts(run_dir)] == ["signal"]


def test_resume_takes_everything_from_the_folder(tmp_path: Path, corpus: Path) -> None:
    run_dir, data = tmp_path / "run", f"data.folder={corpus}"
    stopped = signal_at_step(SIGUSR1, 3, run_dir, data, "train.tokens=5k", processes=1)
    assert stopped.code == 128 + SIGUSR1
    resumed = finish(start("resume", f"run_dir={run_dir}"))
    assert resumed.code == 0, resumed.err
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 21))
    before = contents(run_dir)
    again = finish(start("resume", f"run_dir={run_dir}", cold=True))
    assert again.code == 0
    assert "is complete" in again.err
    assert contents(run_dir) == before


def test_resume_says_what_a_folder_lacks(tmp_path: Path) -> None:
    refused = finish(start("resume", f"run_dir={tmp_path}"))
    assert refused.code == 2
    assert "is not a run folder: it has no config.yaml" in refused.err
