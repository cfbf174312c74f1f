"""Goodput: the share of the wall time of a run that went into steps that counted; the rest, too.

The wall time goes from the start of the first attempt to the end of the last, or to now while one
runs. metrics.jsonl holds the steps that counted: a run that resumes drops the lines behind its
checkpoint and takes those steps again. What was dropped stands in history.jsonl as "dropped".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_train.tracking.history import FINISHED, RUNNING, Attempt, attempts, note

DROPPED = "dropped"  # event: lines of metrics.jsonl, and seconds that they stand for
SKIPPED = "skipped"  # event: a step whose update was left out
ROLLED_BACK = "rolled back"  # event: the weights of an older step were taken again

_PARTS = {
    "productive": "steps that counted",
    "skipped": "steps whose update was skipped or rolled back",
    "replayed": "steps that were lost and had to be taken again",
    "validation": "validation",
    "saving": "waiting for saves",
    "pauses": "between steps: logging, entering a phase",
    "waiting": "between attempts",
    "rest": "start-up, ends, and steps that were cut off",
}


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went, in seconds.

    Attributes:
        wall_s: from the first start to the last end, or to now.
        seconds: by part, see `meaning`; they add up to the wall time. What the files do not
            tell is missing, and part of "rest".
        unknown: what that is, in words.
    """

    wall_s: float
    seconds: Mapping[str, float]
    unknown: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Productive time over wall time; NaN for a run that has just begun."""
        return self.seconds["productive"] / self.wall_s if self.wall_s > 0 else math.nan

    def meaning(self, part: str) -> str:
        """Say what a part is, with what the files could not tell from it."""
        if part != "rest" or not self.unknown:
            return _PARTS[part]
        return f"{_PARTS[part]}; with them, since the files do not tell: {', '.join(self.unknown)}"


def goodput(
    events: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, float]], now: float
) -> Goodput | None:
    """Measure the goodput of a run.

    Args:
        events: of its history.jsonl.
        lines: of its metrics.jsonl.
        now: seconds since 1970; the end of a run that goes on, or has no end noted.

    Returns:
        None if the history holds no attempt, so that nobody knows the wall time.
    """
    tried = attempts(events)
    if not tried:
        return None
    ends = [_end(one, following, now) for one, following in _with_next(tried)]
    wall = max(ends) - tried[0].start
    steps, lost = _split(tried[-1], lines)
    found: dict[str, float] = dict.fromkeys(("productive", "skipped", "replayed"), 0.0)
    skipped = _undone(events)
    found["skipped"] = _seconds((x for x in steps if x["step"] in skipped), "step_time_s")
    found["productive"] = _seconds(steps, "step_time_s") - found["skipped"]
    found["replayed"] = _seconds(lost, "step_time_s") + _seconds(lost, "pause_s")
    found["replayed"] += _seconds((x for x in events if x["event"] == DROPPED), "seconds")
    unknown: tuple[str, ...] = ()
    if any("pause_s" in line for line in lines):
        found["validation"] = _seconds(steps, "validation_time_s")
        found["saving"] = _seconds(steps, "save_time_s")
        pauses = _seconds(steps, "pause_s") - found["validation"] - found["saving"]
        found["pauses"] = max(0.0, pauses)
    elif lines:  # of a version that did not measure them
        unknown = ("validation", "saving", *("steps that were taken again" for _ in tried[1:2]))
    found["waiting"] = sum(
        max(0.0, following.start - end)
        for (_, following), end in zip(_with_next(tried), ends, strict=True)
        if following is not None
    )
    found["rest"] = max(0.0, wall - sum(found.values()))
    return Goodput(wall, {part: found[part] for part in _PARTS if part in found}, unknown)


def note_dropped(run_dir: Path, step: int, lines: Sequence[Mapping[str, float]]) -> None:
    """Note in the history how much work behind a checkpoint is lost, before it is done again."""
    seconds = _seconds(lines, "step_time_s") + _seconds(lines, "pause_s")
    note(run_dir, DROPPED, step=step, steps=len(lines), seconds=round(seconds, 3))


def _with_next(tried: Sequence[Attempt]) -> Iterable[tuple[Attempt, Attempt | None]]:
    return zip(tried, [*tried[1:], None], strict=True)


def _end(one: Attempt, following: Attempt | None, now: float) -> float:
    """Return when an attempt ended; one without a note did so before the next at the latest."""
    if one.end is not None:
        return one.end
    return now if following is None else following.start


def _undone(events: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the steps that left nothing in the weights: skipped, or before a rollback."""
    skipped = {event["step"] for event in events if event["event"] == SKIPPED}
    for event in events:
        if event["event"] == ROLLED_BACK:
            skipped.update(range(event["to"] + 1, event["step"] + 1))
    return skipped


def _split(
    last: Attempt, lines: Sequence[Mapping[str, float]]
) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    """Tell steps that count from those that the next attempt will have to take again."""
    if last.outcome in (RUNNING, FINISHED) or last.end_step is None:
        return list(lines), []
    kept = last.end_step
    return [x for x in lines if x["step"] <= kept], [x for x in lines if x["step"] > kept]


def _seconds(lines: Iterable[Mapping[str, Any]], name: str) -> float:
    return sum(line.get(name, 0.0) for line in lines)
