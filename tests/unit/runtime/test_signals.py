"""The first signal is noted, a second Ctrl-C interrupts."""

import signal
from collections.abc import Iterator

import pytest

from hybrid_train.runtime.heartbeat import StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    noted = StopSignals()
    yield noted
    noted.restore()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_nothing_is_interrupted(
    signals: StopSignals, number: signal.Signals
) -> None:
    assert signals.received is None
    signal.raise_signal(number)
    assert signals.received is number


def test_second_ctrl_c_interrupts(signals: StopSignals) -> None:
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGTERM])
def test_the_request_of_whoever_looks_after_the_run_goes_before_the_schedulers(
    signals: StopSignals, first: signal.Signals
) -> None:
    for number in (first, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        signal.raise_signal(number)
    assert signals.received is signal.SIGUSR1


def test_handlers_from_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    assert signal.getsignal(signal.SIGTERM) != before
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) == before
