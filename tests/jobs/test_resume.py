"""A run that stopped, whatever stopped it, goes on as if it had not."""

import re
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest

from tests.jobs.command import (
    Finished,
    assert_equal_to_the_bit,
    checkpoints,
    metrics,
    signal_at_step,
    train,
)
from tests.jobs.conftest import STEPS

pytestmark = pytest.mark.xdist_group("train")

Run = tuple[Path, Finished]


@pytest.mark.slow
def test_half_and_the_other_half_equal_the_whole_to_the_bit(
    long_run: Run, steady: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "halves"
    first = train(run_dir, *steady, f"train.tokens={STEPS * 128}")
    assert first.code == 0, first.err
    assert len(metrics(run_dir)) == STEPS // 2
    second = train(run_dir, *steady, f"train.tokens={STEPS * 256}")
    assert second.code == 0, second.err
    assert f"going on from {run_dir}/checkpoints/step_000000{STEPS // 2}" in second.said
    assert f"train.tokens: {STEPS * 128} before, {STEPS * 256} from here on" in second.said
    assert_equal_to_the_bit(run_dir, long_run[0], STEPS)


@dataclass(frozen=True)
class Stopped:
    """How a run was stopped, and what stood there then."""

    finished: Finished
    checkpoints: list[str]
    steps: list[float]


@dataclass(frozen=True)
class Story:
    """One run that was stopped three times."""

    run_dir: Path
    by_sigterm: Stopped
    by_ctrl_c: Stopped
    by_sigkill: Stopped
    last: Finished


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, steady: tuple[str, ...]) -> Story:
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    command = (*steady, f"train.tokens={STEPS * 256}", "checkpoint.interval=6")

    def stop(number: int, step: int) -> Stopped:
        finished = signal_at_step(number, step, run_dir, *command)
        return Stopped(finished, checkpoints(run_dir), [line["step"] for line in metrics(run_dir)])

    return Story(
        run_dir, stop(SIGTERM, 4), stop(SIGINT, 15), stop(SIGKILL, 26), train(run_dir, *command)
    )


@pytest.mark.parametrize(("which", "number"), [("by_sigterm", SIGTERM), ("by_ctrl_c", SIGINT)])
def test_a_signal_saves_the_step_and_stops(story: Story, which: str, number: int) -> None:
    stopped: Stopped = getattr(story, which)
    assert stopped.finished.code == 128 + number, stopped.finished.err
    assert stopped.steps == list(range(1, len(stopped.steps) + 1))
    assert len(stopped.steps) < STEPS
    assert stopped.checkpoints[-1] == f"step_{len(stopped.steps):08d}"
    assert not any(name.endswith(".partial") for name in stopped.checkpoints)
    assert f"stopped by {number.name}" in stopped.finished.said
    assert "the same command goes on" in stopped.finished.said


def test_a_killed_run_goes_on_from_its_last_checkpoint(story: Story) -> None:
    killed = story.by_sigkill
    assert killed.finished.code == -SIGKILL
    newest = max(int(name[5:13]) for name in killed.checkpoints if "partial" not in name)
    assert newest <= len(killed.steps)
    assert story.last.code == 0, story.last.err
    (came_from,) = re.findall(r"going on from \S+/step_(\d+)", story.last.said)
    assert int(came_from) == newest


def test_no_step_is_missing_or_doubled_after_all_stops(story: Story) -> None:
    assert [line["step"] for line in metrics(story.run_dir)] == list(range(1, STEPS + 1))
    assert not any("partial" in name for name in checkpoints(story.run_dir))


def test_a_run_that_was_stopped_three_times_equals_one_that_was_not_to_the_bit(
    story: Story, long_run: Run
) -> None:
    assert_equal_to_the_bit(story.run_dir, long_run[0], STEPS)
