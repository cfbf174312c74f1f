"""Which losses are spikes, and which processes are slow."""

import math

import pytest

from hybrid_train.schema.checkpoint import Recovery
from hybrid_train.training.bad_steps import BadSteps, SpikeError
from hybrid_train.training.hooks.processes import stragglers

SETTINGS = Recovery(spike_sigmas=6.0, spike_window=8)
USUAL = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.0]  # mean 2, standard deviation 0.0756


def judge(losses: list[float], settings: Recovery = SETTINGS) -> BadSteps:
    found = BadSteps(settings)
    for loss in losses:
        found.require_usual(loss)
        found.took(loss)
    return found


def test_a_loss_beyond_the_sigmas_is_a_spike_and_one_within_is_not() -> None:
    found = judge(USUAL)
    found.require_usual(2.45)
    with pytest.raises(SpikeError, match=r"6\.\d standard deviations above the 2.0000 of the last"):
        found.require_usual(2.46)


def test_no_loss_is_a_spike_before_the_window_is_full() -> None:
    judge(USUAL[:7]).require_usual(1000.0)


def test_zero_sigmas_accept_any_loss() -> None:
    judge(USUAL, Recovery(spike_sigmas=0, spike_window=8)).require_usual(1000.0)


def test_a_run_that_goes_on_judges_as_one_that_did_not_stop() -> None:
    lines = [{"loss": loss} for loss in USUAL]
    resumed = BadSteps(SETTINGS, [*lines, {"loss": math.nan, "skipped": 1.0}])
    assert resumed.in_a_row == 1
    with pytest.raises(SpikeError):
        resumed.require_usual(2.46)


def test_a_step_that_is_taken_ends_the_row() -> None:
    found = judge(USUAL)
    found.skipped()
    found.skipped()
    assert found.in_a_row == 2
    found.took(2.0)
    assert found.in_a_row == 0


def test_a_slow_process_is_named_with_the_part_of_the_step() -> None:
    times = [[0.01, 0.1, 0.02, 0.001] for _ in range(4)]
    times[2] = [0.06, 0.1, 0.02, 0.001]
    assert stragglers(times, 1.5) == ["rank 2, data: 60.0 ms, median 10.0"]


def test_differences_below_two_milliseconds_are_not_told() -> None:
    assert stragglers([[0.001, 0.1, 0.02, 0.001], [0.0025, 0.1, 0.02, 0.001]], 1.5) == []


def test_a_new_phase_may_have_a_loss_of_its_own() -> None:
    found = judge(USUAL)
    found.forget()
    for loss in (5.0, 5.1, 4.9):
        found.require_usual(loss)
        found.took(loss)
