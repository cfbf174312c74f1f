"""history.jsonl in a run folder: each attempt at the run, how it ended, and what happened beside.

One event a line: "attempt" when processes begin, "end" when they are gone, others in between
("skipped", "rolled back", "fallback", "save failed", "copy failed", "stragglers", "data changed").
"""

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_train.config.secrets import masked_data

FILE_NAME = "history.jsonl"
ATTEMPT, END = "attempt", "end"
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"

Event = Mapping[str, Any]
_NEEDED = {
    ATTEMPT: {"attempt", "step"},
    END: {"attempt", "step", "outcome", "kind", "cause", "ranks"},
}


@dataclass(frozen=True)
class Attempt:
    """One group of processes that worked at a run.

    Attributes:
        number: from 1.
        start: when it began, seconds since 1970.
        processes: of the attempt.
        nodes: machines they were on.
        host: of rank 0.
        job: of SLURM, if it was there.
        start_step: step that it went on from.
        provenance: command, code, machines and libraries; empty in a run folder of format 1.
        end: when it was gone; None while it runs, or where nobody noted it yet.
        end_step: step of the newest checkpoint then.
        outcome: running, finished, stopped or failed.
        kind: word for the cause: finished, signal, clock, killed, hang, error, ...
        cause: the cause in a sentence.
        ranks: processes that it began with, if any stand out.
    """

    number: int
    start: float
    processes: int
    nodes: int
    host: str
    job: str | None
    start_step: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    end: float | None = None
    end_step: int | None = None
    outcome: str = RUNNING
    kind: str = ""
    cause: str = ""
    ranks: tuple[int, ...] = ()


def note(run_dir: Path, event: str, at: float | None = None, **details: object) -> None:
    """Append an event with its time in UTC.

    Args:
        run_dir: the run folder.
        event: what happened, in a word.
        at: when, seconds since 1970; now, if it is left out.
        details: what else there is to know, as JSON has it.
    """
    moment = _now() if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC)
    time = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    with (run_dir / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(masked_data({"time": time, "event": event, **details})) + "\n")


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return all events, oldest first; a line that is damaged, or was cut short, is left out."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
            seconds(event)
        except (ValueError, TypeError, KeyError):
            continue  # the disk was full, or the process killed while it wrote
        if _NEEDED.get(event.get("event"), {"event"}) <= event.keys():
            found.append(event)
    return found


def seconds(event: Event) -> float:
    """Return the time of an event, seconds since 1970."""
    return datetime.datetime.fromisoformat(event["time"]).timestamp()


def attempts(events: Iterable[Event]) -> list[Attempt]:
    """Put beginnings and ends together, oldest first."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == ATTEMPT:
            known = {name: event.get(name) for name in ("processes", "nodes", "host", "job")}
            start = {"start": seconds(event), "start_step": event["step"]}
            origin = event.get("provenance")
            start["provenance"] = origin if isinstance(origin, dict) else {}
            found[event["attempt"]] = {"number": event["attempt"], **known, **start}
        elif event["event"] == END and event["attempt"] in found:
            found[event["attempt"]] |= {
                **{name: event[name] for name in ("outcome", "kind", "cause")},
                "end": seconds(event),
                "end_step": event["step"],
                "ranks": tuple(event["ranks"]),
            }
    return [Attempt(**one) for one in found.values()]


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
