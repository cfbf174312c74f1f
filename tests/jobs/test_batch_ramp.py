"""A batch that grows: the run goes on in the middle of it, and validation does not see it."""

import shutil
from pathlib import Path

import pytest

from tests.jobs.command import Finished, assert_equal_to_the_bit, metrics, train

pytestmark = pytest.mark.xdist_group("train")

LENGTH = 64  # tokens of a sequence of the tiny run
# Two stages of 512 tokens: 4 steps of 2 sequences, 2 of 4, then 6 a step: 1408 after 7 steps.
RAMP = (
    "train.global_batch=6",
    "train.batch_ramp.tokens=1024",
    "train.batch_ramp.start_batch=2",
    "train.batch_ramp.increment=2",
)
BATCHES = [2, 2, 2, 2, 4, 4, 6, 6, 6]


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_the_ramp_goes_on_to_the_bit(
    steady: tuple[str, ...], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = (*steady, *RAMP, "train.tokens=2176", "checkpoint.interval=5")
    straight = train(whole, *command)
    assert straight.code == 0, straight.err
    lines = metrics(whole)
    assert [line["global_batch"] for line in lines] == BATCHES
    seen = [LENGTH * sum(BATCHES[: step + 1]) for step in range(len(BATCHES))]
    assert [line["tokens"] for line in lines] == seen

    shutil.copytree(whole, killed)  # as it was when its second stage had one step to go
    shutil.rmtree(killed / "checkpoints" / "step_00000009")
    resumed = train(killed, *command)
    assert resumed.code == 0, resumed.err
    assert f"going on from {killed}/checkpoints/step_00000005" in resumed.said
    assert_equal_to_the_bit(killed, whole, len(BATCHES))

    constant = train(tmp_path / "constant", *steady, "train.global_batch=6", "train.tokens=512")
    assert constant.code == 0, constant.err
    assert not any("global_batch" in line for line in metrics(tmp_path / "constant"))
    assert held_out(constant) == held_out(straight)


def held_out(run: Finished) -> list[str]:
    """What a run says about the sequences of its validation."""
    return [line for line in run.said.splitlines() if "validation data:" in line]
