"""A run that is killed while it writes a checkpoint goes on from the one before."""

import time
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.jobs.command import (
    ROOT,
    TIMEOUT_S,
    arguments,
    checkpoints,
    finish,
    last_step,
    metrics,
    start_program,
    train,
    untimed,
)

pytestmark = pytest.mark.xdist_group("train")


@pytest.mark.slow
def test_sigkill_during_an_asynchronous_save_costs_nothing_but_the_steps_since_the_last(
    steady: tuple[str, ...], long_run: tuple[Path, object], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = (*steady, f"train.tokens={12 * 256}", "checkpoint.interval=4")
    program = str(ROOT / "tests" / "jobs" / "slow_disk.py")
    process = start_program(program, *arguments(run_dir, *command))
    deadline = time.monotonic() + TIMEOUT_S
    while last_step(run_dir) < 11 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(SIGKILL)
    killed = finish(process)
    assert killed.code == -SIGKILL, killed.err
    assert len(metrics(run_dir)) >= 11  # it trained on while the save of step 8 hung
    assert checkpoints(run_dir) == ["step_00000004", "step_00000008.partial"]

    finished = train(run_dir, *command)
    assert finished.code == 0, finished.err
    partial = f"{run_dir}/checkpoints/step_00000008.partial"
    assert f"removed {partial}, which an interrupted save left behind" in finished.said
    assert f"going on from {run_dir}/checkpoints/step_00000004" in finished.said
    assert checkpoints(run_dir) == ["step_00000008", "step_00000012"]
    losses = [line["loss"] for line in untimed(long_run[0])[:12]]
    assert [line["loss"] for line in untimed(run_dir)] == losses
