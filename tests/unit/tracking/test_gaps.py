"""Gaps to a baseline have closed forms on losses that are made for it."""

import math
from pathlib import Path

import pytest

from hybrid_train.tracking.gaps import (
    TAIL,
    WINDOWS,
    Curve,
    compare,
    curve,
    gap,
    gaps,
    spread,
    tokens_needed,
    validation_gaps,
)
from hybrid_train.tracking.jsonl import JsonLines, read_metrics

STEPS = 100
WHOLE = (0.0, 1.0)


def run(*losses: float, validation: float = math.nan) -> Curve:
    """A run of 10 tokens a step."""
    return Curve([10.0 * n for n in range(1, len(losses) + 1)], losses, validation)


def flat(loss: float, validation: float = math.nan) -> Curve:
    return run(*[loss] * STEPS, validation=validation)


def test_a_window_is_the_mean_of_the_steps_behind_its_start_up_to_its_end() -> None:
    counting = run(*map(float, range(1, STEPS + 1)))  # the loss of step n is n
    means = {name: counting.mean(window) for name, window in WINDOWS.items()}
    # 21..25, 46..50, 71..75, 96..100, 91..100
    expected = {"25 %": 23, "50 %": 48, "75 %": 73, "end": 98, "last 10 %": 95.5}
    assert means == pytest.approx(expected)


def test_a_larger_batch_counts_for_more() -> None:
    growing = Curve(tokens=[10, 40], losses=[1.0, 2.0])
    assert growing.mean(WHOLE) == pytest.approx((10 * 1 + 30 * 2) / 40)


def test_a_window_between_two_steps_is_the_step_before_it() -> None:
    assert run(5.0, 4.0, 3.0).mean((0.7, 0.75)) == 4.0
    assert math.isnan(run(5.0, 4.0, 3.0).mean((0.1, 0.2)))


def test_a_gap_is_relative_to_the_baseline() -> None:
    assert gap(2.02, 2.0) == pytest.approx(0.01)
    assert gap(1.9, 2.0) == pytest.approx(-0.05)


def test_gaps_are_paired_by_seed_in_whatever_order_the_runs_come() -> None:
    # Seeds lie far apart and every pair has a gap of 1 %: nothing but pairing gives no deviation.
    baseline = {1: flat(2.0, 2.5), 2: flat(4.0, 5.0), 3: flat(3.0, 3.5)}
    variant = {3: flat(3.03, 3.57), 1: flat(2.02, 2.55), 2: flat(4.04, 5.1)}
    found = compare(variant, baseline)
    for one in found.windows.values():
        assert (one.mean, one.number) == (pytest.approx(0.01), 3)
        assert one.deviation == pytest.approx(0, abs=1e-12)
    assert found.validation_gap.mean == pytest.approx(0.02)
    assert found.validation_gap.deviation == pytest.approx(0, abs=1e-12)


def test_a_seed_that_one_side_lacks_is_left_out() -> None:
    baseline, variant = {1: flat(2.0, 2.0), 2: flat(4.0, 4.0)}, {2: flat(5.0, 6.0), 3: flat(9.0)}
    assert gaps(variant, baseline, WHOLE) == [pytest.approx(0.25)]
    assert validation_gaps(variant, baseline) == [pytest.approx(0.5)]


def test_a_baseline_has_no_gap_to_itself() -> None:
    runs = {1: flat(2.0), 2: flat(4.0)}
    found = compare(runs, runs)
    assert {one.mean for one in (*found.windows.values(), *found.curve)} == {0.0}
    assert found.losses[TAIL].mean == 3.0


def test_runs_of_other_steps_are_compared_at_the_same_share_of_their_tokens() -> None:
    halves = (*[4.0] * 50, *[2.0] * 50)
    short, long = run(*halves), run(*[4.4] * 100, *[2.2] * 100)
    found = compare({1: long}, {1: short}).windows
    assert [found[name].mean for name in WINDOWS] == pytest.approx([0.1] * len(WINDOWS))


def test_a_spread_has_the_deviation_of_a_sample() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.lowest, found.highest) == (2.0, 1.0, 1.0, 3.0)
    assert found.relative == 0.5


def test_one_value_has_no_deviation_and_a_diverged_one_leaves_nothing() -> None:
    assert spread([2.0]).mean == 2.0
    assert math.isnan(spread([2.0]).deviation)
    assert math.isnan(spread([2.0, math.nan]).mean)
    assert math.isnan(spread([]).mean)


@pytest.mark.parametrize(("loss", "within"), [(1.05, True), (0.95, True), (1.08, False)])
def test_a_gap_is_held_against_the_deviation_of_the_baselines_own_seeds(
    loss: float, within: bool
) -> None:
    # 2.0 and 2.2 deviate by 0.2 / sqrt(2) = 0.1414, which is 6.7 % of their mean.
    baseline = {1: flat(2.0), 2: flat(2.2)}
    variant = {1: flat(2.0 * loss), 2: flat(2.2 * loss)}
    assert compare(variant, baseline).within_seeds is within


def test_one_seed_does_not_tell_whether_a_gap_is_within_seeds() -> None:
    assert compare({1: flat(2.1)}, {1: flat(2.0)}).within_seeds is None


def test_a_curve_follows_a_gap_that_opens_half_way() -> None:
    baseline, variant = run(*[2.0] * 100), run(*[2.0] * 50, *[2.2] * 50)
    found = compare({1: variant}, {1: baseline})
    by_share = dict(zip(found.shares, found.curve, strict=True))
    assert by_share[0.5].mean == 0
    assert by_share[0.55].mean == pytest.approx(0.1)


def of_length(steps: int, validation: float) -> Curve:
    return run(*[3.0] * steps, validation=validation)


# Half a nat for each doubling: the loss is a line in the logarithm of tokens.
LENGTHS = [of_length(100, 4.0), of_length(200, 3.5), of_length(400, 3.0)]


@pytest.mark.parametrize(
    ("loss", "tokens"),
    [
        (4.0, 1000),
        (3.75, 1000 * 2**0.5),
        (3.5, 2000),
        (3.125, 1000 * 2**1.75),
        (3.0, 4000),
        (4.1, 1000),  # bounds: no shorter run, and no longer one
        (2.9, 4000),
    ],
)
def test_tokens_for_a_loss_are_read_between_runs_of_several_lengths(
    loss: float, tokens: float
) -> None:
    assert tokens_needed(loss, LENGTHS) == pytest.approx(tokens)


def test_a_longer_run_that_is_worse_than_a_shorter_one_is_passed_over_where_it_does_not_help() -> (
    None
):
    worse = [of_length(100, 4.0), of_length(200, 4.2), of_length(400, 3.2)]
    # Between 200 and 400 steps the loss falls by 1; half of that is at the mean of the logarithms.
    assert tokens_needed(3.7, worse) == pytest.approx(2000 * 2**0.5)


def test_a_curve_is_read_from_what_a_run_logs(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.log(1, {"tokens": 8, "loss": 5.0, "step_time_s": 0.5, "validation_loss": 6.0})
    log.log(2, {"tokens": 16, "loss": math.nan, "step_time_s": 0.25})
    log.close()
    found = curve(read_metrics(tmp_path / "metrics.jsonl"))
    assert (found.tokens, found.validation, found.seconds) == ([8, 16], 6.0, 0.75)
    assert found.losses[0] == 5.0
    assert math.isnan(found.mean((0.5, 1.0)))


def test_a_student_is_compared_by_its_cross_entropy_and_not_by_its_divergence() -> None:
    student = {"loss": 0.5, "cross_entropy": 3.0, "tokens": 10}
    lines = [student, {**student, "validation_loss": 0.6, "validation_cross_entropy": 3.5}]
    found = curve(lines)
    assert list(found.losses) == [3.0, 3.0]
    assert found.validation == 3.5
    diverged = curve([{**student, "loss": math.nan}])
    assert math.isnan(diverged.losses[0])
