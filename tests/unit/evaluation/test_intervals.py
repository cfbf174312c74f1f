"""Intervals against references written apart, and how often they cover a truth that is known.

`pytest -s -m slow tests/unit/evaluation/test_intervals.py` prints the table of docs/measured.md.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from hybrid_train.evaluation.intervals import (
    Interval,
    mean_interval,
    pass_at_k,
    score_difference,
    score_interval,
)

Z = NormalDist().inv_cdf(0.975)
CASES = 2000  # each covers or does not: two standard errors of 95 % are one per cent


@pytest.mark.parametrize(("right", "items"), [(0, 10), (3, 50), (25, 50), (50, 50)])
def test_the_ends_of_a_score_interval_solve_the_equation_of_wilson(right: int, items: int) -> None:
    found = score_interval([1.0] * right + [0.0] * (items - right))
    assert found.estimate == right / items
    for end in (found.low, found.high):
        if 1e-9 < end < 1 - 1e-9:
            z = abs(found.estimate - end) / math.sqrt(end * (1 - end) / items)
            assert z == pytest.approx(Z)
    assert (found.low < 1e-9) == (right == 0)
    assert (found.high > 1 - 1e-9) == (right == items)


@pytest.mark.parametrize(("better", "worse", "items"), [(5, 1, 50), (0, 4, 30), (12, 12, 40)])
def test_the_ends_of_a_difference_solve_the_equation_of_tango(
    better: int, worse: int, items: int
) -> None:
    differences = [1.0] * better + [-1.0] * worse + [0.0] * (items - better - worse)
    found = score_difference(differences)
    assert found.estimate == pytest.approx((better - worse) / items)
    assert found.low < found.estimate < found.high
    for end in (found.low, found.high):
        deviation = abs(better - worse - items * end)
        sigma = math.sqrt(items * likeliest_variance(better, worse, items, end))
        assert deviation / sigma == pytest.approx(Z, rel=1e-3)


def likeliest_variance(better: int, worse: int, items: int, truth: float) -> float:
    """Variance of a difference where shares are the likeliest with `truth` between them: a grid."""
    q = np.linspace(max(0.0, -truth), (1 - truth) / 2, 2_000_001)[1:-1]  # share of the worse
    logs = better * np.log(q + truth) + worse * np.log(q)
    best = q[np.argmax(logs + (items - better - worse) * np.log1p(-2 * q - truth))]
    return float(2 * best + truth - truth**2)


def test_no_difference_at_all_and_a_perfect_one_have_an_interval() -> None:
    same, perfect = score_difference([0.0] * 50), score_difference([1.0] * 50)
    assert same.low == -same.high != 0
    assert 0.8 < perfect.low < perfect.high == 1


def test_grades_between_right_and_wrong_are_surer_than_those() -> None:
    rough, fine = score_interval([0.0, 1.0] * 20), score_interval([0.4, 0.6] * 20)
    assert rough.estimate == pytest.approx(fine.estimate)
    assert fine.high - fine.low < (rough.high - rough.low) / 4


@pytest.mark.parametrize("interval", [score_interval, score_difference, mean_interval])
def test_items_of_one_document_count_as_one_where_they_are_all_alike(
    interval: Callable[..., Interval],
) -> None:
    apart = np.random.default_rng(3).integers(0, 2, 400).astype(float)
    repeated = np.repeat(apart, 5)
    documents = [f"{number:03}" for number in range(400) for _ in range(5)]
    expected, found = interval(apart), interval(repeated, documents=documents)
    assert found.estimate == pytest.approx(expected.estimate)
    length = expected.high - expected.low
    assert found.high - found.low == pytest.approx(length, rel=0.02)
    naive = interval(repeated)
    alone = interval(repeated, documents=[""] * len(repeated))
    assert alone.high - alone.low == pytest.approx(naive.high - naive.low, rel=0.02)
    assert naive.high - naive.low < 0.5 * length


def test_a_bootstrap_is_that_of_its_definition() -> None:
    random = np.random.default_rng(5)
    sizes = random.integers(1, 50, 60).astype(float)
    totals = sizes * random.exponential(2, 60)
    found = mean_interval(totals, sizes)
    ratio, error = studentized_parts(totals, sizes)
    drawn = []
    for _ in range(10_000):
        picked = random.integers(60, size=60)
        other, its_error = studentized_parts(totals[picked], sizes[picked])
        drawn.append((other - ratio) / its_error)
    left, right = np.quantile(drawn, [0.025, 0.975])
    both = np.quantile(np.abs(drawn), 0.95)
    assert found.estimate == pytest.approx(ratio)
    # Both have 10,000 resamples of their own.
    assert found.low == pytest.approx(ratio - error * (right + both) / 2, abs=0.1 * error)
    assert found.high == pytest.approx(ratio + error * (both - left) / 2, abs=0.1 * error)


def studentized_parts(totals: Any, sizes: Any) -> tuple[float, float]:
    """A ratio of sums and its standard error, by the delta method."""
    ratio = totals.sum() / sizes.sum()
    return ratio, math.sqrt(((totals - ratio * sizes) ** 2).sum()) / sizes.sum()


def test_the_same_seed_gives_the_same_interval_and_a_shift_shifts_it() -> None:
    losses = np.random.default_rng(0).exponential(1, 100)
    found = mean_interval(losses, resamples=500, seed=1)
    assert found == mean_interval(losses, resamples=500, seed=1)
    assert found != mean_interval(losses, resamples=500, seed=2)
    moved = mean_interval(losses + 100, resamples=500, seed=1)
    assert moved.low - 100 == pytest.approx(found.low)
    assert moved.high - 100 == pytest.approx(found.high)


def test_what_does_not_vary_has_no_width_and_one_item_says_nothing() -> None:
    assert mean_interval([0.1] * 7) == Interval(*[pytest.approx(0.1)] * 3)
    assert mean_interval([0.5]) == Interval(0.5, -math.inf, math.inf)
    assert mean_interval([1.0, 2.0], documents=["a", "a"]).high == math.inf
    two = mean_interval([1.0, 2.0])
    assert two.low == -math.inf
    assert two.high == math.inf


@pytest.mark.parametrize("interval", [score_interval, score_difference, mean_interval])
@pytest.mark.parametrize("values", [[], [0.5, math.nan], [0.5, math.inf], [[0.5]]])
def test_values_that_are_no_numbers_are_refused(
    interval: Callable[..., Interval], values: list[Any]
) -> None:
    with pytest.raises(ValueError, match=r"an interval needs|not NaN"):
        interval(values)


def test_scores_and_sizes_out_of_bounds_are_refused() -> None:
    for call in (
        lambda: score_interval([1.1]),
        lambda: score_interval([-0.1]),
        lambda: score_difference([-1.1]),
        lambda: mean_interval([1.0, 1.0], [1.0, 0.0]),
        lambda: mean_interval([1.0, 1.0], [1.0]),
        lambda: mean_interval([1.0, 1.0], documents=["a"]),
    ):
        with pytest.raises(ValueError, match=r"values must be|size above|has a document"):
            call()


@pytest.mark.parametrize("k", [1, 2, 7, 10])
def test_pass_at_k_is_the_share_of_draws_of_k_with_a_right_one(k: int) -> None:
    samples, correct = np.full(11, 10), np.arange(11)
    expected = [1 - math.comb(10 - c, k) / math.comb(10, k) for c in range(11)]
    assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_takes_numbers_of_samples_of_each_problem() -> None:
    assert pass_at_k([4, 300], [1, 0], 4) == pytest.approx([1, 0])
    assert pass_at_k([5, 300], [1, 1], 4) == pytest.approx([0.8, 4 / 300])


@pytest.mark.parametrize(
    ("samples", "correct", "k"),
    [
        ([4], [5], 1),
        ([4], [-1], 1),
        ([4], [2], 5),
        ([4], [2], 0),
        ([4], [0.5], 1),
        ([4], [1, 1], 1),
    ],
)
def test_counts_that_cannot_be_are_refused(samples: Any, correct: Any, k: int) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        pass_at_k(samples, correct, k)


# How often intervals cover: each case draws data of which the truth is known.

type Case = tuple[float, Interval]  # the truth, and what was found
type Draw = Callable[[np.random.Generator, int], Case]


def accuracy(p: float) -> Draw:
    """The truth lies around p: the lattice of whole numbers favours one value, harms its neighbour.

    What it does to single values is computed exactly below.
    """

    def draw(random: np.random.Generator, n: int) -> Case:
        truth = near(p, random)
        return truth, score_interval((random.random(n) < truth).astype(float))

    return draw


def accuracies(p: float, q: float) -> Draw:
    """Two models on the same items, half of which both meet with the same luck."""

    def draw(random: np.random.Generator, n: int) -> Case:
        one, other = near(p, random), near(q, random)
        luck = random.random((2, n))
        luck[1] = np.where(random.random(n) < 0.5, luck[0], luck[1])
        right = luck < np.array([[one], [other]])
        return one - other, score_difference(right[0].astype(float) - right[1])

    return draw


def near(p: float, random: np.random.Generator) -> float:
    return float(p + min(p, 1 - p) * random.uniform(-0.1, 0.1))


def bootstrap(truth: float, draw: Callable[[np.random.Generator, int], Any]) -> Draw:
    return lambda random, n: (truth, resampled(random, draw(random, n)))


def resampled(random: np.random.Generator, *given: Any) -> Interval:
    return mean_interval(*given, resamples=399, seed=int(random.integers(2**32)))


def losses_by_size(random: np.random.Generator, n: int) -> Case:
    sizes = np.ceil(np.exp(4 + random.standard_normal(n)))
    totals = sizes * np.exp(0.5 * random.standard_normal(n))
    return math.exp(0.125), resampled(random, totals, sizes)


def by_document(random: np.random.Generator, n: int) -> Case:
    """Five items a document, of which each has an accuracy of its own around 0.3."""
    own = np.repeat(random.beta(0.9, 2.1, n // 5), 5)
    right = (random.random(len(own)) < own).astype(float)
    return 0.3, score_interval(right, [f"{number}" for number in range(n // 5) for _ in range(5)])


def solved(a: float, b: float) -> Draw:
    """Pass@4 of eight answers to problems, solved with a probability from Beta(a, b)."""
    log_beta = [math.lgamma(a) + math.lgamma(y) - math.lgamma(a + y) for y in (b, b + 4)]

    def draw(random: np.random.Generator, n: int) -> Case:
        correct = random.binomial(8, random.beta(a, b, n))
        found = score_interval(pass_at_k(np.full(n, 8), correct, 4))
        return 1 - math.exp(log_beta[1] - log_beta[0]), found

    return draw


def lognormal(random: np.random.Generator, n: int) -> Any:
    return np.exp(random.standard_normal(n))


SIMULATED: dict[str, Draw] = {
    "accuracy near 0.5": accuracy(0.5),
    "accuracy near 0.05": accuracy(0.05),
    "accuracy near 0.95": accuracy(0.95),
    "difference of accuracies near 0.5 and 0.6": accuracies(0.5, 0.6),
    "difference of accuracies near 0.05 and 0.08": accuracies(0.05, 0.08),
    "difference of accuracies near 0.95 and 0.9": accuracies(0.95, 0.9),
    "accuracy 0.3, five items a document": by_document,
    "pass@4 of 8, problems from Beta(0.3, 1)": solved(0.3, 1),
    "pass@4 of 8, problems from Beta(0.1, 3)": solved(0.1, 3),
    "losses, exponential": bootstrap(1, lambda random, n: random.exponential(1, n)),
    "losses, lognormal, sigma 1": bootstrap(math.exp(0.5), lognormal),
    "losses by token, sizes lognormal": losses_by_size,
    "differences of lognormal losses": bootstrap(
        0, lambda random, n: lognormal(random, n) - lognormal(random, n)
    ),
    "differences from Student's t with 3 degrees": bootstrap(
        0, lambda random, n: random.standard_t(3, n)
    ),
}

SCORES = [name for name in SIMULATED if name.startswith(("accuracy", "difference of", "pass"))]


def coverage(name: str, items: int) -> float:
    random = np.random.default_rng([items, *name.encode()])
    cases = (SIMULATED[name](random, items) for _ in range(CASES))
    return sum(found.low <= truth <= found.high for truth, found in cases) / CASES


@pytest.mark.parametrize("items", [50, 200, 1000])
@pytest.mark.parametrize("truth", [0.5, 0.05, 0.95])
def test_score_intervals_cover_by_the_sum_over_all_outcomes(truth: float, items: int) -> None:
    covered = 0.0
    for right in range(items + 1):
        found = score_interval(np.arange(items) < right)
        if found.low <= truth <= found.high:
            log_ways = math.lgamma(items + 1) - math.lgamma(right + 1)
            log_ways -= math.lgamma(items - right + 1)
            log_share = right * math.log(truth) + (items - right) * math.log(1 - truth)
            covered += math.exp(log_ways + log_share)
    assert 0.93 <= covered <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "items"),
    # Bootstraps of 1,000 items take minutes, and it is few items that are hard.
    [(name, n) for name in SIMULATED for n in (50, 200, 1000) if n < 1000 or name in SCORES],
)
def test_intervals_cover_the_truth_in_93_to_97_percent_of_the_cases(name: str, items: int) -> None:
    found = coverage(name, items)
    print(f"\n{name} | {items} | {100 * found:.1f} %")
    assert 0.93 <= found <= 0.97
