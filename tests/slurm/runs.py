"""Submits runs to the test cluster as a user does, and reads what they leave behind."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from hybrid_train.checkpoint import layout
from hybrid_train.tracking import history
from tests.jobs.command import ROOT, last_step, metrics
from tests.slurm.cluster import Cluster, wait_until

START_S = 240  # a start of the trainer takes 6 s on two free cores; never what a test waits for
# Nothing in it depends on the length of training; tests stop it long before its end.
OVERRIDES = (
    "experiment=tiny_cpu",
    "cluster=slurm_cpu",
    "cluster.nodes=2",
    "cluster.time_limit=30",
    "runtime.threads=1",
    "schedule=constant",
    "schedule.peak_lr=3e-3",
    "schedule.warmup_tokens=512",
    "train.tokens=100M",
    "checkpoint.interval=0",
)


def submit_command(run_dir: Path, corpus: Path, *overrides: str) -> list[str]:
    # Another test cluster on this machine numbers its jobs alike: each has ports of its own, below
    # those that Linux gives to whoever asks for any.
    port = f"cluster.port={20_000 + os.getpid() % 12 * 1000}"
    words = [sys.executable, "-m", "hybrid_train", "submit", *OVERRIDES, port]
    return [*words, f"run_dir={run_dir}", f"data.folder={corpus}", *overrides]


def submit(cluster: Cluster, run_dir: Path, corpus: Path, *overrides: str) -> str:
    """Submit and return the id of the job."""
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        submit_command(run_dir, corpus, *overrides),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (number,) = re.findall(r"^job (\d+):", done.stdout)
    return number


def attempts(run_dir: Path) -> list[history.Attempt]:
    return history.attempts(history.read(run_dir))


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in history.read(run_dir) if event["event"] == name]


def log(run_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted((run_dir / "logs").glob("slurm_*.log")))


@contextlib.contextmanager
def explained(run_dir: Path):  # type: ignore[no-untyped-def]
    """Show the log of a job beside a failure."""
    try:
        yield
    except AssertionError as error:
        steps = re.compile(r"^(step |\[rank).*\n", re.MULTILINE)
        error.add_note(steps.sub("", log(run_dir))[-6000:])
        raise


def wait_for_steps(run_dir: Path, attempt: int) -> None:
    """Wait until an attempt has done two steps of its own."""

    def done() -> bool:
        found = attempts(run_dir)
        if len(found) < attempt or not last_step(run_dir):
            return False
        return metrics_step(run_dir) >= found[attempt - 1].start_step + 2

    with explained(run_dir):
        wait_until(done, f"attempt {attempt} does two steps", START_S)


def wait_for_checkpoint(run_dir: Path, attempt: int) -> None:
    """Wait until a checkpoint of an attempt is whole; a save goes on beside the steps."""
    wait_for_steps(run_dir, attempt)

    def done() -> bool:
        newest = layout.latest(run_dir)
        return newest is not None and newest.step > attempts(run_dir)[attempt - 1].start_step

    with explained(run_dir):
        wait_until(done, f"attempt {attempt} has saved", START_S)


def metrics_step(run_dir: Path) -> int:
    return int(metrics(run_dir)[-1]["step"])


def wait_for_state(cluster: Cluster, job: str, run_dir: Path, *states: str) -> None:
    with explained(run_dir):
        wait_until(lambda: cluster.state(job) in states, f"job {job} is {states}", START_S)


def wait_for_restart(cluster: Cluster, job: str, run_dir: Path, count: int) -> None:
    """Wait until SLURM has put a job back into the queue so many times."""
    with explained(run_dir):
        what = f"job {job} was queued again {count} times"
        wait_until(lambda: int(cluster.job(job)["Restarts"]) >= count, what, START_S)
