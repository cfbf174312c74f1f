"""Requests to stop: Ctrl-C, SIGTERM and SIGUSR1 are noted, and acted upon between two steps."""

import signal
import types

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes the first signal; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, _: types.FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def restore(self) -> None:
        """Put back what handled the signals before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
