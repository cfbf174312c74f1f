"""One smoothed training loss, whoever shows it."""

import math

import pytest

from hybrid_train.tracking.metrics import (
    LONGEST_WINDOW,
    smoothed_curve,
    smoothed_loss,
    smoothing_window,
)


def test_the_window_grows_with_the_run_up_to_a_hundred_steps() -> None:
    lengths = (0, 1, 19, 20, 999, 1000, 10**6)
    assert [smoothing_window(steps) for steps in lengths] == [1, 1, 1, 2, 99, 100, 100]


@pytest.mark.parametrize("steps", [1, 9, 40, 100, 101, 1500])
def test_the_last_point_of_the_curve_is_the_smoothed_loss_of_the_run(steps: int) -> None:
    losses = [8.0 / step + 0.1 * math.sin(step) for step in range(1, steps + 1)]
    assert smoothed_curve(losses)[-1] == pytest.approx(smoothed_loss(losses), rel=1e-12)
    tail = losses[-smoothing_window(steps) :]
    assert smoothed_loss(losses) == pytest.approx(sum(tail) / len(tail), rel=1e-12)


def test_no_later_step_changes_a_value() -> None:
    losses = [5.0 + math.cos(step) for step in range(300)]
    assert smoothed_curve(losses)[:200] == smoothed_curve(losses[:200])


def test_what_is_not_finite_is_left_out() -> None:
    losses = [1.0] * 18 + [math.nan, 3.0]  # the window of the last two steps has one that counts
    assert smoothed_loss(losses) == smoothed_curve(losses)[-1] == 3.0
    assert math.isnan(smoothed_curve(losses)[-2])
    assert math.isnan(smoothed_loss([math.nan]))
    assert math.isnan(smoothed_loss([]))


def test_a_constant_stays_what_it_is() -> None:
    assert smoothed_curve([2.0] * (3 * LONGEST_WINDOW)) == [2.0] * (3 * LONGEST_WINDOW)
