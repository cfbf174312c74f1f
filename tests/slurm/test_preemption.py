"""A job that is preempted three times and then cancelled equals one that nobody disturbed."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybrid_train.tracking.history import Attempt
from hybrid_train.tracking.wandb import ID_FILE
from tests.jobs.command import assert_equal_to_the_bit, checkpoints, metrics
from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm_preemption")]

PREEMPTIONS = 3
PROCTRACK = "pgid"  # signals reach the task of a node alone, as under proctrack/cgroup


@dataclass(frozen=True)
class Story:
    """A job that was disturbed."""

    run_dir: Path
    attempts: list[Attempt]
    restarts_at_the_end: int
    state: str

    @property
    def last_step(self) -> int:
        step = self.attempts[-1].end_step
        assert step is not None
        return step


@pytest.fixture(scope="module")
def story(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    run_dir = tmp_path_factory.mktemp("preempted") / "run"
    trackers = ("tracking.tensorboard=true", "tracking.wandb.mode=offline")
    job = runs.submit(cluster, run_dir, corpus, *trackers)
    for number in range(1, PREEMPTIONS + 1):
        runs.wait_for_steps(run_dir, attempt=number)
        urgent = cluster.run(
            *("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive"),
            *("--output=/dev/null", "--wrap=sleep 1"),
        )
        runs.wait_for_restart(cluster, job, run_dir, number)
        runs.wait_for_state(cluster, urgent, run_dir, "COMPLETED")
    runs.wait_for_steps(run_dir, attempt=PREEMPTIONS + 1)
    cluster.run("scancel", job)
    runs.wait_for_state(cluster, job, run_dir, "CANCELLED")
    with runs.explained(run_dir):
        assert runs.attempts(run_dir)[-1].outcome == "stopped"
    seen = cluster.job(job)
    return Story(run_dir, runs.attempts(run_dir), int(seen["Restarts"]), seen["JobState"])


def test_each_preemption_saves_and_the_next_start_goes_on_from_there(story: Story) -> None:
    assert [one.number for one in story.attempts] == list(range(1, PREEMPTIONS + 2))
    assert {(one.outcome, one.kind) for one in story.attempts} == {("stopped", "signal")}
    ends = [one.end_step for one in story.attempts]
    assert [one.start_step for one in story.attempts] == [0, *ends[:-1]]
    queued = runs.events(story.run_dir, "queued again")
    assert [event["step"] for event in queued] == ends[:-1]
    assert len({one.job for one in story.attempts}) == 1


def test_a_cancelled_job_saves_and_is_not_queued_again(story: Story) -> None:
    assert story.state == "CANCELLED"
    assert story.restarts_at_the_end == PREEMPTIONS
    assert checkpoints(story.run_dir)[-1] == f"step_{story.last_step:08d}"


def test_no_step_is_missing_or_doubled(story: Story) -> None:
    steps = [line["step"] for line in metrics(story.run_dir)]
    assert steps == list(range(1, story.last_step + 1))


def test_tensorboard_shows_one_curve(story: Story) -> None:
    seen = EventAccumulator(str(story.run_dir / "tensorboard")).Reload()
    steps = [point.step for point in seen.Scalars("loss/loss")]
    assert steps == list(range(1, story.last_step + 1))


def test_weights_and_biases_has_one_run(story: Story) -> None:
    parts = list((story.run_dir / "wandb").glob("offline-run-*"))
    assert len(parts) == len(story.attempts)  # each start writes a part of it
    (number,) = {part.name.rpartition("-")[2] for part in parts}
    assert number == (story.run_dir / ID_FILE).read_text().strip()


def test_the_parameters_equal_those_of_an_undisturbed_job_to_the_bit(
    story: Story, cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run_dir, steps = tmp_path / "straight", story.last_step
    length = f"train.tokens={(steps + 1) * 256}"  # a step more: the last one validates
    job = runs.submit(cluster, run_dir, corpus, length, f"checkpoint.interval={steps}")
    runs.wait_for_state(cluster, job, run_dir, "COMPLETED", "FAILED")
    with runs.explained(run_dir):
        assert cluster.state(job) == "COMPLETED"
        assert [one.outcome for one in runs.attempts(run_dir)] == ["finished"]
    assert_equal_to_the_bit(story.run_dir, run_dir, steps)
