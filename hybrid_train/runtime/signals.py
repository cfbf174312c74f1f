"""Requests to stop: Ctrl-C, SIGTERM and SIGUSR1 are noted, and acted upon between two steps."""

import signal
import types

# The later goes before the earlier. A scheduler may send SIGTERM to every process of a job; SIGUSR1
# comes from whoever looks after the run, and means to go on with it later.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes a signal; a Ctrl-C after it interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _: types.FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        before = -1 if self.received is None else SIGNALS.index(self.received)
        self.received = SIGNALS[max(before, SIGNALS.index(signal.Signals(number)))]

    def restore(self) -> None:
        """Put back what handled the signals before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
