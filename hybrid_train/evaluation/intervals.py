"""How sure a figure is: intervals of means and rates, of differences of two models, of pass@k.

Which method stands where was decided by simulation (`tests/unit/evaluation/test_intervals.py`, its
table in docs/measured.md): an interval of 95 % is to cover the truth in 93 to 97 % of the cases.

    scores, from 0 to 1     Wilson's interval. Resamples of few rare successes hardly vary, so that
                            percentiles of a bootstrap cover too seldom near 0 and 1.
    their differences       Tango's score interval for pairs, for the same reason.
    losses, without bounds  bootstrap of the studentized mean. Percentiles, plain or BCa, cover in
                            90 to 92 % of the cases where losses of 50 items have a long tail.

Items of one document are not independent: where `documents` says which item is of which, documents
are drawn, or weighed, as a whole.

Sources: Wilson, JASA 22 (1927) 209; Tango, Statistics in Medicine 17 (1998) 891; Hall, The
Bootstrap and Edgeworth Expansion (1992), sections 3.5 and 3.6.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, lgamma, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

type Floats = NDArray[np.float64]

RESAMPLES = 10_000
_AT_ONCE = 2**20  # draws of a bootstrap that are in memory at once
_HALVINGS = 60  # of an interval no longer than 2: to the precision of a float64


@dataclass(frozen=True)
class Interval:
    """An estimate, and between which values the truth lies with some confidence."""

    estimate: float
    low: float
    high: float


def score_interval(
    scores: ArrayLike, documents: Sequence[str] | None = None, confidence: float = 0.95
) -> Interval:
    """Return the mean of scores, with Wilson's interval.

    It is that of as many rights and wrongs as would vary like the scores: grades between 0 and 1
    vary less than those, items of one document more.

    Args:
        scores: of each item, 0 to 1, [items].
        documents: which document an item is of, "" for none, [items]; None: all are independent.
        confidence: share of the intervals that are to cover the truth.

    Raises:
        ValueError: if there are none, or if one is NaN or no score.
    """
    values = _checked(scores, 0, 1)
    mean = float(values.mean())
    items, z = _effective(values, mean * (1 - mean), documents, confidence)
    center = (mean + z * z / (2 * items)) / (1 + z * z / items)
    half = sqrt(mean * (1 - mean) / items + (z / (2 * items)) ** 2) * z / (1 + z * z / items)
    return Interval(mean, max(0.0, center - half), min(1.0, center + half))


def score_difference(
    differences: ArrayLike, documents: Sequence[str] | None = None, confidence: float = 0.95
) -> Interval:
    """Return the mean difference of the scores of two models, with Tango's interval for pairs.

    Args:
        differences: score of one model less that of the other on the same item, -1 to 1, [items].
        documents: as for `score_interval`.
        confidence: share of the intervals that are to cover the truth.

    Raises:
        ValueError: if there are none, or if one is NaN or out of bounds.
    """
    values = _checked(differences, -1, 1)
    mean = float(values.mean())
    better, worse = float(np.maximum(values, 0).mean()), float(np.maximum(-values, 0).mean())
    items, z = _effective(values, better + worse - mean**2, documents, confidence)

    def is_outside(truth: float) -> bool:
        # Share of the worse that is likeliest under this truth, and the variance that follows.
        b = (2 - better + worse) * truth - better - worse
        root = sqrt(max(0.0, b * b + 8 * worse * truth * (1 - truth)))
        variance = max(0.0, (root - b) / 2 + truth * (1 - truth))
        return items * (mean - truth) ** 2 > z * z * variance

    return Interval(mean, _edge(is_outside, mean, -1.0), _edge(is_outside, mean, 1.0))


def mean_interval(
    totals: ArrayLike,
    sizes: ArrayLike | None = None,
    documents: Sequence[str] | None = None,
    confidence: float = 0.95,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return sum(totals) / sum(sizes), with the interval of a bootstrap over items or documents.

    Of losses it is nats per token, or bits per byte; of differences of two models on the same items
    the paired difference. The statistic of a resample is studentized: (its ratio - the ratio) / its
    standard error. Each end lies in the middle between that of the equal-tailed interval, which
    follows skewness and is too short where tails are heavy on both sides, and that of the
    symmetric one, which is the other way round.

    Args:
        totals: summed loss of each item, or a difference of such, [items].
        sizes: tokens or bytes of each, positive, [items]; None: 1 each.
        documents: which document an item is of, "" for none, [items]; None: all are independent.
        confidence: share of the intervals that are to cover the truth.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The interval; from -inf to inf where there is one item or document alone.

    Raises:
        ValueError: if there are none, or if one is NaN or infinite, or a size is not positive.
    """
    values = _checked(totals, -inf, inf)
    weights = np.ones_like(values) if sizes is None else _checked(sizes, 0, inf)
    if len(weights) != len(values) or not weights.all():
        raise ValueError("each item has a size above 0")
    ratio = float(values.sum() / weights.sum())
    residuals = _by_document(values - ratio * weights, documents)
    weights = _by_document(weights, documents)
    if len(residuals) == 1:
        return Interval(ratio, -inf, inf)
    error = float(np.sqrt((residuals**2).sum()) / weights.sum())
    if error <= 1e-12 * abs(ratio):  # all items are alike, but for rounding
        return Interval(ratio, ratio, ratio)
    drawn = _studentized(residuals, weights, resamples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    # Not interpolated: the deviation of a resample without spread is infinite.
    left, right = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    both = np.quantile(np.abs(drawn), confidence, method="inverted_cdf")
    low, high = ratio - error * (right + both) / 2, ratio + error * (both - left) / 2
    return Interval(ratio, float(low), float(high))


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> Floats:
    """Estimate for each problem how likely one of k answers is right, without bias.

        1 - C(n - c, k) / C(n, k)

    They are scores: `score_interval` and `score_difference` say how sure their mean is. It covers
    the truth where percentiles of a bootstrap over problems do not: where few problems are solved.

    Args:
        samples: n, answers to each problem, at least k, [problems].
        correct: c, those of them that are right, [problems].
        k: how many answers may be given.

    Raises:
        ValueError: if counts are no whole numbers with 0 <= c <= n and 1 <= k <= n.

    Source: Chen et al., arXiv:2107.03374, equation 1.
    """
    n, c = np.asarray(samples), np.asarray(correct)
    whole = np.issubdtype(n.dtype, np.integer) and np.issubdtype(c.dtype, np.integer)
    if not whole or n.shape != c.shape or np.any((c < 0) | (c > n) | (n < k)) or k < 1:
        raise ValueError("pass@k needs whole numbers, 0 <= correct <= samples, 1 <= k <= samples")
    log_factorial = np.array([lgamma(i + 1) for i in range(int(n.max(initial=0)) + 1)])
    wrong = n - c
    left = np.maximum(wrong - k, 0)  # where fewer than k are wrong, one of k is right
    none_right = np.exp(
        log_factorial[wrong] - log_factorial[left] + log_factorial[n - k] - log_factorial[n]
    )
    return np.where(wrong < k, 1.0, 1 - none_right)


def _checked(values: ArrayLike, low: float, high: float) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError("an interval needs one value for each of one item or more")
    if not np.isfinite(found).all() or found.min() < low or found.max() > high:
        raise ValueError(f"values must be numbers from {low} to {high}, not NaN")
    return found


def _by_document(values: Floats, documents: Sequence[str] | None) -> Floats:
    """Add up the values of each document; an item without one stands for itself."""
    if documents is None:
        return values
    if len(documents) != len(values):
        raise ValueError("each item has a document")
    names = [name or f"\0{place}" for place, name in enumerate(documents)]
    numbers = np.unique(np.asarray(names), return_inverse=True)[1]
    return np.bincount(numbers, weights=values)


def _effective(
    values: Floats, variance: float, documents: Sequence[str] | None, confidence: float
) -> tuple[float, float]:
    """Return how many independent items of a variance give a mean as sure, and its quantile.

    Few documents say little of how much they differ, so theirs is Student's quantile.
    """
    sums = _by_document(values - values.mean(), documents)
    observed = float((sums**2).sum()) / len(values) ** 2
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    if documents is not None and len(sums) > 1:
        rest = len(sums) - 1
        # Expansion of Student's quantile around the normal one (Abramowitz and Stegun, 26.7.5).
        z += (z**3 + z) / (4 * rest) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * rest**2)
    tiny = 1e-12  # nothing varies: each document is at least one item
    return (float(len(sums)) if observed < tiny or variance < tiny else variance / observed), z


def _edge(is_outside: Callable[[float], bool], inner: float, outer: float) -> float:
    """Find where an interval ends, between a value in it and the last that there can be."""
    if not is_outside(outer):
        return outer
    for _ in range(_HALVINGS):
        middle = (inner + outer) / 2
        inner, outer = (inner, middle) if is_outside(middle) else (middle, outer)
    return inner


def _studentized(
    residuals: Floats, weights: Floats, resamples: int, random: np.random.Generator
) -> Floats:
    """Return the studentized deviation of the ratio in each resample, [resamples].

    A resample is known by how often it has each row, so sums over it are products of matrices.
    """
    rows = len(residuals)
    columns = np.stack([residuals, weights, residuals**2, residuals * weights, weights**2], axis=1)
    deviations = []
    chunk = max(1, _AT_ONCE // rows)
    for start in range(0, resamples, chunk):
        now = min(chunk, resamples - start)
        drawn = random.integers(rows, size=(now, rows), dtype=np.int32)
        drawn += (np.arange(now, dtype=np.int32) * rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=now * rows).reshape(now, rows)
        off, size, squares, mixed, sizes = (counts.astype(np.float64) @ columns).T
        ratio = off / size
        spread = np.maximum(squares - 2 * ratio * mixed + ratio**2 * sizes, 0)
        # A resample without spread tells nothing but its side.
        with np.errstate(divide="ignore", invalid="ignore"):
            deviation = off / np.sqrt(spread)
        deviations.append(np.where(np.isnan(deviation), 0.0, deviation))
    return np.concatenate(deviations)
