"""A disk that is full before the run, and one that fills up while a checkpoint is saved."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.command import checkpoints, metrics, train

pytestmark = pytest.mark.xdist_group("disk")

ONE_CHECKPOINT = "5m"  # of tiny_cpu: 3 MB; two do not fit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 5 MB; its size can be changed with `resize`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ONE_CHECKPOINT}", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip("needs the right to mount a small disk" + (f": {done.stderr}" if done else ""))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_run_does_not_start_where_no_checkpoint_fits(small_disk: Path, corpus: Path) -> None:
    resize(small_disk, "1m")
    finished = train(small_disk / "run", f"data.folder={corpus}")
    assert finished.code == 2
    assert "the disk is full: a checkpoint needs about 3 MB" in finished.err
    assert "choose another run_dir=" in finished.err
    assert "Traceback" not in finished.said
    assert list(small_disk.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_checkpoint_and_the_run_goes_on_when_it_has_room(
    small_disk: Path, corpus: Path
) -> None:
    run_dir = small_disk / "run"
    command = (f"data.folder={corpus}", "checkpoint.interval=5")
    finished = train(run_dir, *command)
    assert finished.code == 2
    assert f"the disk is full: {run_dir}/checkpoints/step_00000010" in finished.err
    assert "Free space" in finished.err
    assert "Traceback" not in finished.said
    assert checkpoints(run_dir) == ["step_00000005"]
    resize(small_disk, "20m")
    again = train(run_dir, *command)
    assert again.code == 0, again.err
    assert f"going on from {run_dir}/checkpoints/step_00000005" in again.said
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 11))
    assert checkpoints(run_dir) == ["step_00000005", "step_00000010"]
