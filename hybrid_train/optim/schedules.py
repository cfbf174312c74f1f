"""Learning rate as a pure function of the tokens seen; no state to save, none to restore.

The rate of a step is taken at the number of tokens seen before that step. So the first step runs
at 0 tokens: its rate is 0 where there is a warm-up, and the peak where there is none. This is what
`OptimizerParamScheduler` of megatron-core does, which moves on after each step; the two are equal.
"""

import math
from collections.abc import Callable

from hybrid_train.schema.optimizer import Cosine, DecayShape, Schedule, Wsd
from hybrid_train.schema.units import tokens as read_tokens

# Share of (peak - final) that is left after a share r of the decay; 1 at r = 0, 0 at r = 1.
_SHAPES: dict[DecayShape, Callable[[float], float]] = {
    DecayShape.linear: lambda r: 1 - r,
    DecayShape.cosine: lambda r: 0.5 * (1 + math.cos(math.pi * r)),
    DecayShape.exponential: lambda r: 2 * 0.5**r - 1,
    DecayShape.minus_sqrt: lambda r: 1 - math.sqrt(r),
}


def learning_rate(schedule: Schedule, tokens: int, total_tokens: int) -> float:
    """Return the learning rate of the step that starts after `tokens` tokens.

        warm-up   peak * tokens / warmup
        stay      peak
        decay     final + shape(r) * (peak - final), r from 0 to 1 over the decay
        after     final

    The decay of a cosine lasts from the end of the warm-up to the end of training, that of WSD over
    the last `decay_tokens`. With `final = final_lr_ratio * peak`, the shapes are linear 1 - r,
    cosine (1 + cos(pi r)) / 2, exponential 2 * 0.5^r - 1, and minus_sqrt 1 - sqrt(r).

    Args:
        schedule: peak, lengths and shape.
        tokens: tokens seen by all ranks before the step.
        total_tokens: tokens of the whole run; the decay ends there.

    Raises:
        ValueError: if warm-up and decay together are longer than the run.

    Source: Loshchilov and Hutter, arXiv:1608.03983, eq. 5 (cosine); Hu et al., arXiv:2404.06395,
        section 4 (WSD); Haegele et al., arXiv:2405.18392, section 3.2 (1 - sqrt); the exponential
        shape as in megatron-core, `optimizer_param_scheduler.py`.
    """
    peak = schedule.peak_lr
    warmup = read_tokens(schedule.warmup_tokens)
    if tokens <= warmup and warmup > 0:
        return peak * tokens / warmup
    if not isinstance(schedule, Cosine):
        return peak
    start, shape = _decay(schedule, warmup, total_tokens)
    if tokens <= start:
        return peak
    final = schedule.final_lr_ratio * peak
    if tokens >= total_tokens:
        return final
    return final + shape((tokens - start) / (total_tokens - start)) * (peak - final)


def _decay(
    schedule: Cosine, warmup: int, total_tokens: int
) -> tuple[int, Callable[[float], float]]:
    """Return the token count at which the decay starts, and its shape."""
    if not isinstance(schedule, Wsd):
        return warmup, _SHAPES[DecayShape.cosine]
    start = total_tokens - read_tokens(schedule.decay_tokens)
    if start < warmup:
        raise ValueError(
            f"warmup_tokens ({warmup}) and decay_tokens ({schedule.decay_tokens}) together exceed "
            f"the {total_tokens} tokens of the run; shorten one of them or train for longer"
        )
    return start, _SHAPES[schedule.decay_shape]
