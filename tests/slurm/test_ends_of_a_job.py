"""What follows when a job meets its time limit, loses a worker or a node, or gets nowhere."""

import os
import signal
from pathlib import Path

import pytest

from tests.jobs.command import metrics
from tests.slurm import runs
from tests.slurm.cluster import Cluster, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm_ends")]

PROCTRACK = "linuxproc"  # signals and kills reach all that runs below a task


def test_before_the_time_limit_the_run_saves_and_the_job_is_queued_again(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # SLURM looks every 30 s: the signal comes 75 to 105 s after the start of a job of two minutes.
    limits = ("cluster.time_limit=2", "cluster.signal_s=15")
    job = runs.submit(cluster, run_dir, corpus, *limits)
    runs.wait_for_restart(cluster, job, run_dir, 1)
    runs.wait_for_steps(run_dir, attempt=2)
    first, second = runs.attempts(run_dir)[:2]  # on a slow machine the second has met its limit too
    assert (first.outcome, first.kind) == ("stopped", "signal")
    assert "SIGUSR1" in first.cause
    assert first.end_step == second.start_step > 0
    cluster.run("scancel", job)
    runs.wait_for_state(cluster, job, run_dir, "CANCELLED")


def test_a_killed_worker_is_started_again_inside_the_job_and_a_lost_node_is_done_without(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = ("cluster.min_nodes=1", "checkpoint.interval=2", "train.tokens=100M")
    job = runs.submit(cluster, run_dir, corpus, *options)
    runs.wait_for_checkpoint(run_dir, attempt=1)
    os.kill(cluster.workers("n2")[0], signal.SIGKILL)
    runs.wait_for_checkpoint(run_dir, attempt=2)
    assert cluster.job(job)["Restarts"] == "0"
    cluster.kill_node("n2")
    try:
        runs.wait_for_restart(cluster, job, run_dir, 1)
        runs.wait_for_steps(run_dir, attempt=3)
        found = runs.attempts(run_dir)
        assert [one.nodes for one in found] == [2, 2, 1]
        assert [one.processes for one in found] == [2, 2, 1]
        assert all(one.start_step >= 2 for one in found[1:])
    finally:
        cluster.run("scancel", job)
        cluster.start_node("n2")
    wait_until(lambda: cluster.node_states() == ["idle"] * 2, "both nodes are back", runs.START_S)


def test_a_lost_node_is_waited_for_where_fewer_are_not_accepted(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = runs.submit(cluster, run_dir, corpus, "checkpoint.interval=2")
    runs.wait_for_checkpoint(run_dir, attempt=1)
    cluster.kill_node("n2")
    try:
        runs.wait_for_state(cluster, job, run_dir, "PENDING")
        assert len(runs.attempts(run_dir)) == 1
    finally:
        cluster.start_node("n2")
    runs.wait_for_steps(run_dir, attempt=2)
    first, second = runs.attempts(run_dir)
    assert [one.nodes for one in (first, second)] == [2, 2]
    assert second.start_step == first.end_step >= 2
    cluster.run("scancel", job)
    runs.wait_for_state(cluster, job, run_dir, "CANCELLED")


def test_three_attempts_without_progress_end_the_job_with_the_reason(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = ("cluster.sbatch=[--hold]", "cluster.max_restarts=0")
    job = runs.submit(cluster, run_dir, corpus, *options)
    broken = run_dir / "code" / "hybrid_train" / "jobs" / "resume.py"
    broken.write_text("raise OSError('no such device')\n")
    cluster.run("scontrol", "release", job)
    runs.wait_for_state(cluster, job, run_dir, "FAILED")
    assert cluster.job(job)["Restarts"] == "2"
    assert "3 attempts in a row ended at step 0" in runs.log(run_dir)
    (event,) = runs.events(run_dir, "not queued again")
    assert event["step"] == 0
    assert "3 attempts in a row ended at step 0" in event["cause"]


def test_a_sweep_runs_as_an_array_with_a_run_folder_for_each_element(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "sweep"
    options = ("--multirun", "train.seed=1,2", "cluster.nodes=1", "train.tokens=1280")
    job = runs.submit(cluster, run_dir, corpus, *options)
    for element in ("0", "1"):
        runs.wait_for_state(cluster, f"{job}_{element}", run_dir / element, "COMPLETED", "FAILED")
    folders = [run_dir / "0", run_dir / "1"]
    assert [runs.attempts(folder)[-1].outcome for folder in folders] == ["finished"] * 2
    first, second = (metrics(folder) for folder in folders)
    assert [line["step"] for line in first] == [line["step"] for line in second] == [1, 2, 3, 4, 5]
    assert first[0]["loss"] != second[0]["loss"]
