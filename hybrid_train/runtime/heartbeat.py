"""The heartbeat of a process, the watchdog that ends one that hangs, and requests to stop.

The training code says in which part of a step it is: `enter("data")`. The watchdog reads that when
nothing is said for too long, and the report of slow processes takes the times. A process trains one
run at a time, so there is one heartbeat.

Python runs signal handlers between two bytecodes of the main thread, so a process that waits in a
collective never hears a SIGTERM. The C part of Python writes its number to a pipe at once, though,
and there the thread of the watchdog hears of it.
"""

import os
import select
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass

DATA, FORWARD_BACKWARD, REDUCE, OPTIMIZER = "data", "forward_backward", "reduce", "optimizer"
SAVE, VALIDATION, BETWEEN, START = "save", "validation", "between steps", "start"
# Signals that ask to stop; the later in this list goes before the earlier. A scheduler may send
# SIGTERM to every process of a job; SIGUSR1 comes from whoever looks after the run, and means to go
# on with it later.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_HANG_EXIT_CODE = 75  # EX_TEMPFAIL: worth another attempt
_MOST_FRAMES = 25  # of a stack that is kept
# A process that waits for the others gives the one they wait for the time to speak first.
_PATIENCE_S = 5.0
_WAITING = ("torch/distributed/", "/c10d/", "pipeline_parallel/p2p_communication")


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a process.

    Attributes:
        count: heartbeats so far; processes of one layout and stage give the same.
        step: optimizer step that it is in.
        part: of the step.
        since: when it was given, of time.monotonic().
    """

    count: int
    step: int
    part: str
    since: float


_last = Heartbeat(0, 0, START, time.monotonic())
_seconds: dict[str, float] = {}  # since they were taken
_all_seconds: dict[str, float] = {}


def begin() -> None:
    """Start anew: what an earlier run of this process said and took does not count."""
    global _last
    _last = Heartbeat(0, 0, START, time.monotonic())
    _seconds.clear()
    _all_seconds.clear()


def enter(part: str, step: int | None = None) -> None:
    """Say that this process is now in a part of the step, or still is."""
    global _last  # the main thread alone writes it, as a whole
    now = time.monotonic()
    for seconds in (_seconds, _all_seconds):
        seconds[_last.part] = seconds.get(_last.part, 0.0) + now - _last.since
    _last = Heartbeat(_last.count + 1, _last.step if step is None else step, part, now)


def last() -> Heartbeat:
    """Return the last heartbeat; any thread may ask."""
    return _last


def all_seconds() -> dict[str, float]:
    """Return the seconds of each part that is over, since the run began."""
    return dict(_all_seconds)


def take_seconds() -> dict[str, float]:
    """Return the seconds of each part since the last call, the present part up to now."""
    enter(_last.part)
    taken = dict(_seconds)
    _seconds.clear()
    return taken


@dataclass(frozen=True)
class Hang:
    """What the main thread was last seen at, as the thread of the watchdog sees it.

    Attributes:
        beat: its last heartbeat.
        seconds: since then.
        stack: of the main thread, innermost last.
        waits: whether it waits for other processes.
    """

    beat: Heartbeat
    seconds: float
    stack: str
    waits: bool


class Watchdog:
    """Watches the main thread as long as the block lasts, and ends a process that hangs.

    Args:
        limit_s: longest silence; 0: any.
        on_hang: called before this process is ended for its silence.
        on_signal: called when a signal has arrived, whether or not the main thread can hear it.
        on_tick: called every `tick_s` while all is well.
        tick_s: how often it looks.
    """

    def __init__(
        self,
        limit_s: float,
        on_hang: Callable[[Hang], None],
        on_signal: Callable[[signal.Signals, Hang], None],
        on_tick: Callable[[], None],
        tick_s: float = 5.0,
    ) -> None:
        self._limit_s = limit_s
        self._on_hang, self._on_signal, self._on_tick = on_hang, on_signal, on_tick
        self._tick_s = min(tick_s, limit_s / 4) if limit_s else tick_s
        self._main = threading.main_thread().ident
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        enter(START)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._ended.set()
        os.write(self._write, b"\0")  # wakes the thread; no signal has this number
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    def _watch(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select([self._read], [], [], self._tick_s)
            if self._ended.is_set():
                return
            for number in os.read(self._read, 64) if ready else b"":
                self._on_signal(signal.Signals(number), self._look())
            if not ready:
                self._on_tick()
            self._check()

    def _check(self) -> None:
        silence_s = time.monotonic() - last().since
        if not self._limit_s or silence_s < self._limit_s:
            return
        seen = self._look()
        if seen.waits and silence_s < self._limit_s + _PATIENCE_S:
            return
        try:
            self._on_hang(seen)
        finally:
            # The main thread cannot be interrupted where it is; what could be saved is saved.
            os._exit(_HANG_EXIT_CODE)

    def _look(self) -> Hang:
        beat = last()
        frame = sys._current_frames().get(self._main or 0)
        frames = traceback.extract_stack(frame)[-_MOST_FRAMES:] if frame else []
        stack = "".join(traceback.format_list(frames))
        waits = bool(frames) and any(part in frames[-1].filename for part in _WAITING)
        return Hang(beat, time.monotonic() - beat.since, stack, waits)


class StopSignals:
    """Notes a signal that asks to stop; a Ctrl-C after it interrupts at once."""

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


def how_it_ended(code: int, stderr: str) -> str:
    """Say how a process ended: by a signal, or with a code and the last line that it wrote."""
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    words = stderr.strip().splitlines()
    return f"exit code {code}" + (f", {words[-1]}" if words else "")
