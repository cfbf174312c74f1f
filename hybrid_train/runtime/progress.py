"""Where this process is within its step, and how long each part took.

Who trains says `enter("data")`; the watchdog reads it when nothing is said for too long, and the
report of slow processes takes the times. A process trains one run at a time, so there is one of it.
"""

import time
from dataclasses import dataclass

DATA, FORWARD_BACKWARD, REDUCE, OPTIMIZER = "data", "forward_backward", "reduce", "optimizer"
SAVE, VALIDATION, BETWEEN, START = "save", "validation", "between steps", "start"


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a process.

    Attributes:
        count: signs so far; processes of one layout and stage give the same.
        step: optimizer step that it is in.
        part: of the step.
        since: when it said so, of time.monotonic().
    """

    count: int
    step: int
    part: str
    since: float


_last = Sign(0, 0, START, time.monotonic())
_seconds: dict[str, float] = {}  # since they were taken
_all_seconds: dict[str, float] = {}


def begin() -> None:
    """Start anew: what an earlier run of this process said and took does not count."""
    global _last
    _last = Sign(0, 0, START, time.monotonic())
    _seconds.clear()
    _all_seconds.clear()


def enter(part: str, step: int | None = None) -> None:
    """Say that this process is now in a part of the step, or still is."""
    global _last  # the main thread alone writes it, as a whole
    now = time.monotonic()
    for seconds in (_seconds, _all_seconds):
        seconds[_last.part] = seconds.get(_last.part, 0.0) + now - _last.since
    _last = Sign(_last.count + 1, _last.step if step is None else step, part, now)


def last() -> Sign:
    """Return the last sign; any thread may ask."""
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
