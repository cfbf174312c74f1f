"""The global batch of each step: constant, or grown in equal stages at the start of the run.

Pure integers. The batch of a step is that of the tokens seen before it, so there is no state to
save: a run that goes on finds its stage by its position.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.schema.train import Train
from hybrid_train.schema.units import tokens


@dataclass(frozen=True)
class RunLength:
    """What a run takes until it has seen its tokens."""

    steps: int
    sequences: int


def ramps(train: Train) -> bool:
    """Tell whether the batch grows."""
    return tokens(train.batch_ramp.tokens) > 0


def global_batch(train: Train, tokens_seen: int) -> int:
    """Return the sequences of the step that starts after `tokens_seen` tokens.

        start_batch + increment * floor(tokens_seen * n / ramp tokens)

    up to `global_batch`, with n = (global_batch - start_batch) / increment stages of equal length.
    Source: `--rampup-batch-size` of Megatron-LM, which counts sequences; core 0.19.2 has the stages
    one by one (num_microbatches_calculator.py).
    """
    ramp, length = train.batch_ramp, tokens(train.batch_ramp.tokens)
    if tokens_seen >= length:
        return train.global_batch
    stages = (train.global_batch - ramp.start_batch) // ramp.increment
    return ramp.start_batch + ramp.increment * (tokens_seen * stages // length)


def run_length(train: Train, start: int = 0, end: int | None = None) -> RunLength:
    """Count steps and sequences between two positions in tokens; by default of the whole run.

    The first step that reaches the end is the last.
    """
    end = tokens(train.tokens) if end is None else end
    seen, steps = start, 0
    for batch, stage_end in _stages(train):
        step = batch * train.sequence_length
        stop = end if stage_end is None else min(stage_end, end)
        taken = max(0, -(-(stop - seen) // step))
        seen, steps = seen + taken * step, steps + taken
    return RunLength(steps, (seen - start) // train.sequence_length)


def _stages(train: Train) -> Iterator[tuple[int, int | None]]:
    """Yield the batch of each stage, and the tokens at which the next begins; the last has none."""
    length = tokens(train.batch_ramp.tokens)
    if length:
        ramp = train.batch_ramp
        number = (train.global_batch - ramp.start_batch) // ramp.increment
        for stage in range(number):
            yield ramp.start_batch + stage * ramp.increment, -(-(stage + 1) * length // number)
    yield train.global_batch, None
