"""The batch of each step against Megatron's own rule, and the length of a run step by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.planning.phases import (
    global_batch,
    ramps,
    run_length,
)
from hybrid_train.schema.train import BatchRamp, Train
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS
LENGTH = 10


def train(tokens: int, ramp_tokens: int, *, start: int = 4, step: int = 4, end: int = 16) -> Train:
    ramp = BatchRamp(tokens=str(ramp_tokens), start_batch=start, increment=step)
    return Train(tokens=str(tokens), sequence_length=LENGTH, global_batch=end, batch_ramp=ramp)


def batches(settings: Train) -> list[int]:
    """Batches of all steps, one after the other."""
    seen, found = 0, []
    while seen < int(settings.tokens):
        found.append(global_batch(settings, seen))
        seen += found[-1] * LENGTH
    return found


def test_stages_share_the_tokens_of_the_ramp() -> None:
    # Stages of 80 tokens: 2 steps of 40, 1 of 80, then 120 a step: the third begins at 160.
    assert batches(train(600, 240)) == [4, 4, 8, 12, 16, 16]


def test_without_a_ramp_every_batch_is_the_same() -> None:
    settings = train(600, 0)
    assert not ramps(settings)
    assert batches(settings) == [16, 16, 16, 16]


def test_the_last_step_is_the_first_to_reach_the_tokens() -> None:
    assert sum(batches(train(601, 240))) * LENGTH == 760  # 600 after six steps are too few
    assert sum(batches(train(600, 240))) * LENGTH == 600


@given(
    budget=st.integers(1, 5000),
    share=st.floats(0.01, 1),
    start=st.integers(1, 5),
    step=st.integers(1, 5),
    stages=st.integers(1, 6),
)
def test_length_of_a_run_is_that_of_its_steps(
    budget: int, share: float, start: int, step: int, stages: int
) -> None:
    settings = train(
        budget, max(1, round(share * budget)), start=start, step=step, end=start + stages * step
    )
    found = run_length(settings)
    assert (found.steps, found.sequences) == (len(batches(settings)), sum(batches(settings)))


@pytest.mark.usefixtures("groups")  # Megatron must be imported behind the emulation
@pytest.mark.parametrize("sequences", range(0, 40, 3))
def test_batches_are_those_of_the_same_stages_in_megatron(sequences: int) -> None:
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    theirs = StepBatchsizeNumMicroBatchesCalculator(
        rank=1,  # rank 0 prints
        schedule="0:4 80:8 160:12 240:16",
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        seq_length=LENGTH,
    )
    theirs.update(sequences, consistency_check=False)
    ours = global_batch(train(600, 240), sequences * LENGTH)
    assert ours == theirs.get_current_global_batch_size()
