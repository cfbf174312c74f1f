"""The smoothed training loss: one definition for console, summary, status, plots and report.

    smoothed(n) = mean of the losses of the last w(n) steps, step n included
    w(n) = n / 10, rounded down, but from 1 to 100 steps

It looks back only, so that a run knows it while it trains and no later step changes it. Towards the
start, where losses fall fast, the window is short. Losses that are not finite are left out. Windows
of tokens, by which a study compares runs, are another thing: `tracking/gaps.py`.
"""

import math
from collections.abc import Mapping, Sequence
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
    finite = [loss for loss in losses[-window(len(losses)) :] if math.isfinite(loss)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def curve(values: Sequence[float], longest: int = LONGEST) -> list[float]:
    """Return the smoothed value of each step; NaN where there is no finite one.

    Args:
        values: of all steps.
        longest: of the windows, in steps; that of the smoothed loss, if it is left out.
    """
    # Sums from the start: of a hundred thousand values the windows themselves would take minutes.
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(v if f else 0.0 for v, f in zip(values, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    means = []
    for last in range(1, len(values) + 1):
        over = last // _SHARE or 1
        first = last - (over if over < longest else longest)
        number = counts[last] - counts[first]
        means.append((sums[last] - sums[first]) / number if number else math.nan)
    return means


def losses_of(lines: Sequence[Mapping[str, float]]) -> list[float]:
    """Return the training loss of each step from the lines of a metrics.jsonl."""
    return [line["loss"] for line in lines if "loss" in line]
