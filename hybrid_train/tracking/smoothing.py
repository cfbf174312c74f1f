"""The smoothed training loss: one definition for console, summary, status, plots and report.

    smoothed(n) = mean of the losses of the last w(n) steps, step n included
    w(n) = n / 10, rounded down, but from 1 to 100 steps

It looks back only, so that a run knows it while it trains and no later step changes it. Towards the
start, where losses fall fast, the window is short. Losses that are not finite are left out. Windows
of tokens, by which a study compares runs, are another thing: `tracking/gaps.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

LONGEST = 100  # steps
_SHARE = 10  # the window is so many times shorter than the run so far


def window(steps: int, longest: int = LONGEST) -> int:
    """Return over how many steps the loss after `steps` steps is averaged."""
    return min(longest, max(1, steps // _SHARE))


def smoothed_loss(losses: Sequence[float]) -> float:
    """Return the smoothed loss of the last step of a run; NaN if there is none.

    Args:
        losses: of all steps so far, nats per token.
    """
    return curve(losses[-LONGEST:], len(losses) - LONGEST)[-1] if losses else math.nan


def curve(losses: Sequence[float], before: int = 0) -> list[float]:
    """Return the smoothed loss of each step.

    Args:
        losses: of the steps.
        before: steps of the run before these.
    """
    return trailing_means(losses, lambda number: window(number + max(0, before)))


def trailing_means(values: Sequence[float], over: Callable[[int], int]) -> list[float]:
    """Average each value with those before it; what is not finite is left out.

    Args:
        values: in their order.
        over: how many are averaged at value number 1, 2, ...

    Returns:
        As many means; NaN where there is no finite value.
    """
    # Sums from the start: of a hundred thousand values the windows themselves would take minutes.
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(v if f else 0.0 for v, f in zip(values, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    means = []
    for last in range(1, len(values) + 1):
        first = max(0, last - over(last))
        number = counts[last] - counts[first]
        means.append((sums[last] - sums[first]) / number if number else math.nan)
    return means


def losses_of(lines: Sequence[Mapping[str, float]]) -> list[float]:
    """Return the training loss of each step from the lines of a metrics.jsonl."""
    return [line["loss"] for line in lines if "loss" in line]
