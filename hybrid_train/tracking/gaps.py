"""How far the losses of runs are from those of a baseline: relative gaps, paired by seed.

    gap = (loss - loss of the baseline) / loss of the baseline

Both losses are means over the same window of training. Runs of one seed read the same batches from
the same initial weights, so what a batch happens to hold cancels within a pair. How far the seeds
of the baseline lie from each other is the other yardstick: what chance alone does to a run.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A window is a part of training as shares of its tokens: behind the first, up to the second.
WINDOW = 0.05  # share of training that a loss "at" a point is averaged over; it ends there
WINDOWS = {
    "25 %": (0.25 - WINDOW, 0.25),
    "50 %": (0.5 - WINDOW, 0.5),
    "75 %": (0.75 - WINDOW, 0.75),
    "end": (1 - WINDOW, 1.0),
    "last 10 %": (0.9, 1.0),
}
TAIL = "last 10 %"  # what is judged
_POINTS = 100  # of a curve
_ROUNDING = 1e-9  # 0.95 as a float must not move a step over the edge of a window

Window = tuple[float, float]
Runs = Mapping[int, "Curve"]  # by seed


@dataclass(frozen=True)
class Curve:
    """The losses of one run.

    Attributes:
        tokens: seen after each step.
        losses: of each step, nats per token.
        validation: loss at the end; NaN if the run has none.
        before: validation loss before the first step; NaN if it was not measured.
        seconds: that its steps took.
    """

    tokens: Sequence[float]
    losses: Sequence[float]
    validation: float = math.nan
    seconds: float = math.nan
    before: float = math.nan

    @property
    def seen(self) -> float:
        """Tokens that the run itself has seen; one that goes on with another counts on from it."""
        first_step = self.tokens[1] - self.tokens[0] if len(self.tokens) > 1 else self.tokens[0]
        return self.tokens[-1] - self.tokens[0] + first_step

    def tokens_to_reach(self, loss: float) -> float:
        """Return after how many tokens the mean over WINDOW is so low; NaN if it never is."""
        for number in range(round(WINDOW * _POINTS), _POINTS + 1):
            share = number / _POINTS
            if self.mean((share - WINDOW, share)) <= loss:
                return share * self.tokens[-1]
        return math.nan

    def mean(self, window: Window) -> float:
        """Average over a window, every token alike.

        A window between two steps is the step before it; NaN if there is none.
        """
        start, end = (share * self.tokens[-1] for share in window)
        slack = _ROUNDING * self.tokens[-1]
        before = [0.0, *self.tokens[:-1]]
        steps = list(zip(before, self.tokens, self.losses, strict=True))
        inside = [step for step in steps if start + slack < step[1] <= end + slack]
        inside = inside or [step for step in steps if step[1] <= start + slack][-1:]
        weight = sum(after - first for first, after, _ in inside)
        total = sum((after - first) * loss for first, after, loss in inside)
        return total / weight if weight else math.nan


def tokens_needed(loss: float, lengths: Sequence[Curve]) -> float:
    """Return how many tokens a run needs for a validation loss, read between runs of some lengths.

    Each has a schedule of its own, so that its last loss is what so many tokens are worth; a curve
    before its rate has fallen shows less. Between two lengths the loss is a line in the logarithm
    of tokens.

    Args:
        loss: nats per token.
        lengths: runs, from the shortest to the longest.

    Returns:
        Tokens; those of the shortest where it is as low, of the longest where none is: bounds.
    """
    shortest, *others = lengths
    before = shortest
    for one in others if loss < shortest.validation else ():
        if one.validation <= loss:
            share = (before.validation - loss) / (before.validation - one.validation)
            return before.seen * (one.seen / before.seen) ** share
        before = one
    return before.seen


def curve(lines: Sequence[Mapping[str, float]]) -> Curve:
    """Take the losses of a run from the lines of its metrics.jsonl.

    Of a run whose loss is something else, as of a student, these are its cross-entropies: what runs
    of other objectives can be compared with.
    """
    validated = (line for line in lines if "validation_loss" in line)
    validations = [_cross_entropy(line, "validation_") for line in validated]
    return Curve(
        tokens=[line["tokens"] for line in lines],
        losses=[_cross_entropy(line) for line in lines],
        validation=validations[-1] if validations else math.nan,
        seconds=sum(line.get("step_time_s", 0.0) for line in lines),
        before=lines[0].get("start_validation_loss", math.nan) if lines else math.nan,
    )


def _cross_entropy(line: Mapping[str, float], part: str = "") -> float:
    loss = line[f"{part}loss"]
    return line.get(f"{part}cross_entropy", loss) if math.isfinite(loss) else loss


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds; NaN where there are none, or one alone has no deviation."""

    mean: float
    deviation: float  # standard deviation of the sample
    lowest: float
    highest: float
    number: int

    @property
    def relative(self) -> float:
        """The deviation as a share of the mean."""
        return self.deviation / self.mean if self.mean else math.nan


def spread(values: Sequence[float]) -> Spread:
    """Describe the values of several seeds; one that is not finite makes all of it NaN."""
    if not values or not all(map(math.isfinite, values)):
        return Spread(math.nan, math.nan, math.nan, math.nan, len(values))
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), deviation, min(values), max(values), len(values))


def losses(runs: Runs, window: Window) -> Spread:
    """Describe the losses of the seeds in a window, nats per token."""
    return spread([run.mean(window) for run in runs.values()])


def gap(loss: float, baseline: float) -> float:
    """Return how much larger a loss is than that of the baseline, as a share of it."""
    return (loss - baseline) / baseline


def gaps(runs: Runs, baseline: Runs, window: Window) -> list[float]:
    """Return the gap of each seed that both have, in the order of the runs."""
    return [
        gap(run.mean(window), baseline[seed].mean(window))
        for seed, run in runs.items()
        if seed in baseline
    ]


def validation_gaps(runs: Runs, baseline: Runs) -> list[float]:
    """Return the gap of the validation loss of each seed that both have."""
    return [
        gap(run.validation, baseline[seed].validation)
        for seed, run in runs.items()
        if seed in baseline
    ]


@dataclass(frozen=True)
class Comparison:
    """What the runs of one variant are against those of the baseline.

    Attributes:
        windows: gaps over seeds in each of WINDOWS.
        losses: train losses over seeds in each of WINDOWS, nats per token.
        validation_loss: over seeds, nats per token.
        validation_gap: over seeds.
        shares: of training, at which `curve` has a point.
        curve: gaps over seeds at those.
        seeds_curve: relative deviation of its losses over its own seeds at those.
        within_seeds: whether the gap of TAIL is at most the relative deviation of the baseline's
            losses over its own seeds; None if that is not known.
    """

    windows: dict[str, Spread]
    losses: dict[str, Spread]
    validation_loss: Spread
    validation_gap: Spread
    shares: list[float]
    curve: list[Spread]
    seeds_curve: list[float]
    within_seeds: bool | None


def compare(runs: Runs, baseline: Runs) -> Comparison:
    """Compare the runs of a variant with those of the baseline, seed by seed."""
    windows = {name: spread(gaps(runs, baseline, one)) for name, one in WINDOWS.items()}
    allowed = losses(baseline, WINDOWS[TAIL]).relative
    known = math.isfinite(windows[TAIL].mean) and math.isfinite(allowed)
    shares = [n / _POINTS for n in range(round(WINDOW * _POINTS), _POINTS + 1)]
    parts = [(share - WINDOW, share) for share in shares]
    return Comparison(
        windows=windows,
        losses={name: losses(runs, one) for name, one in WINDOWS.items()},
        validation_loss=spread([run.validation for run in runs.values()]),
        validation_gap=spread(validation_gaps(runs, baseline)),
        shares=shares,
        curve=[spread(gaps(runs, baseline, part)) for part in parts],
        seeds_curve=[losses(runs, part).relative for part in parts],
        within_seeds=abs(windows[TAIL].mean) <= allowed if known else None,
    )
