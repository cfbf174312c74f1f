"""Exit reports: what each process of an attempt left as it ended, and the cause that they tell.

    RUN/attempts/0003/rank_00001.json   its exit report
    RUN/attempts/0003/rank_00001.crash  where a signal such as SIGSEGV or SIGBUS met it

A process that was killed leaves none: that is how it is told from the others, which lost it.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hybrid_train.config.secrets import masked_data
from hybrid_train.schema.units import counted

FOLDER = "attempts"
# What ended a process. Every other kind names a fault of its own: error, disk, nonfinite, ...
KILLED, HANG, LOST, TOLD, CRASH, DATA = "killed", "hang", "lost", "told", "crash", "data"
_AFTER_OTHERS = (LOST, TOLD)  # these only follow from what happened to another process


@dataclass(frozen=True)
class ExitReport:
    """What one process left.

    Attributes:
        rank: of the process.
        kind: what ended it, in a word.
        text: the same in a sentence.
        time: seconds since 1970.
        step: that it was in.
        part: of the step.
        signs: heartbeats that it had given; the fewest tell who was late.
        waits: whether it waited for others.
        stack: of its main thread, if that matters.
    """

    rank: int
    kind: str
    text: str
    time: float
    step: int = 0
    part: str = ""
    signs: int = 0
    waits: bool = False
    stack: str = ""


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended."""

    kind: str
    text: str
    ranks: tuple[int, ...]
    time: float | None  # of the last heartbeat; None: there was none


def folder(run_dir: Path, attempt: int) -> Path:
    """Return the folder of an attempt."""
    return run_dir / FOLDER / f"{attempt:04d}"


def crash_file(run_dir: Path, attempt: int, rank: int) -> Path:
    """Return the file that Python's fault handler writes to."""
    return folder(run_dir, attempt) / f"rank_{rank:05d}.crash"


def leave(run_dir: Path, attempt: int, report: ExitReport) -> None:
    """Leave the exit report of a process; later ones take the place of earlier ones."""
    path = folder(run_dir, attempt) / f"rank_{report.rank:05d}.json"
    half = path.with_suffix(".part")
    half.write_text(json.dumps(masked_data(asdict(report))) + "\n", encoding="utf-8")
    half.replace(path)


def read(run_dir: Path, attempt: int) -> list[ExitReport]:
    """Return the reports of all processes that left one, by rank; a crash counts as one."""
    found: dict[int, ExitReport] = {}
    for path in sorted(folder(run_dir, attempt).glob("rank_*.json")):
        with contextlib.suppress(ValueError, TypeError):  # damaged: it says nothing
            report = ExitReport(**json.loads(path.read_text(encoding="utf-8")))
            found[report.rank] = report
    for path in sorted(folder(run_dir, attempt).glob("rank_*.crash")):
        if path.stat().st_size:
            report = _crashed(path)
            found[report.rank] = report
    return [found[rank] for rank in sorted(found)]


def _crashed(path: Path) -> ExitReport:
    """Turn what Python's fault handler wrote into a report."""
    stack = path.read_text(encoding="utf-8", errors="replace")
    what = stack.partition("\n")[0].removeprefix("Fatal Python error: ")
    of_data = "Bus error" in what and "hybrid_train/data/" in stack
    why = ": a data file was cut short, or its disk is gone" if of_data else ""
    rank = int(path.stem.partition("_")[2])
    kind = DATA if of_data else CRASH
    return ExitReport(rank, kind, f"{what}{why}", path.stat().st_mtime, stack=stack)


def cause_of(reports: Sequence[ExitReport], processes: int, alive: float | None) -> Cause:
    """Say why an attempt ended that nobody ended in order.

    Args:
        reports: of all processes that left one.
        processes: of the attempt.
        alive: when rank 0 was last seen, seconds since 1970.
    """
    last = max([one.time for one in reports] + ([alive] if alive else []), default=None)
    own = [one for one in reports if one.kind not in (*_AFTER_OTHERS, HANG)]
    if own:  # the first fault is the cause, what came later followed from it
        first = min(own, key=lambda one: one.time)
        alike = tuple(one.rank for one in own if one.kind == first.kind)
        return Cause(first.kind, f"{_ranks(alike[:1])}{_at(first)}: {first.text}", alike, last)
    silent = tuple(sorted(set(range(processes)) - {one.rank for one in reports}))
    if any(one.kind == HANG or _timed_out(one) for one in reports):
        return _hang(reports, silent, last)
    if silent:
        plural = "was" if len(silent) == 1 else "were"
        text = f"{_ranks(silent)} {plural} killed, without a word"
        return Cause(KILLED, f"{text}{_where(reports)}", silent, last)
    told = [one for one in reports if one.kind == TOLD]
    if told:
        first = min(told, key=lambda one: one.time)
        return Cause(TOLD, first.text, tuple(one.rank for one in told), last)
    first = min(reports, key=lambda one: one.time)
    return Cause(LOST, f"the processes lost each other{_at(first)}: {first.text}", (), last)


def _hang(reports: Sequence[ExitReport], silent: tuple[int, ...], last: float | None) -> Cause:
    """Name who kept the others waiting: who left no report at all, or gave fewest heartbeats.

    A process that waits for others itself is named only if all do.
    """
    if silent:
        text = f"{_ranks(silent)} hung and could not even say where"
        return Cause(HANG, f"{text}{_where(reports)}", silent, last)
    busy = [one for one in reports if not one.waits] or list(reports)
    fewest = min(one.signs for one in busy)
    late = [one for one in busy if one.signs == fewest]
    ranks = tuple(one.rank for one in late)
    place = [line.strip() for line in late[0].stack.split("\n") if line.strip().startswith("File")]
    call = f" in {place[-1]}" if place else ""
    return Cause(HANG, f"{_ranks(ranks)} hung{_at(late[0])}{call}", ranks, last)


def _timed_out(report: ExitReport) -> bool:
    return report.kind == LOST and "timed out" in report.text.lower()


def _where(reports: Sequence[ExitReport]) -> str:
    """Say where the others were when it happened."""
    first = min(reports, key=lambda one: one.time, default=None)
    return f"; the others were{_at(first)}" if first else ""


def _at(report: ExitReport) -> str:
    return f" in step {report.step} ({report.part})" if report.part else ""


def _ranks(ranks: Sequence[int]) -> str:
    """Name ranks: "rank 3", "ranks 0, 1, 2", "ranks 0, 1, 2 and 61 others"."""
    shown = 8
    names = ", ".join(map(str, ranks[:shown]))
    more = f" and {counted(len(ranks) - shown, 'other')}" if len(ranks) > shown else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"


def now(rank: int, kind: str, text: str) -> ExitReport:
    """Return a report of this moment without more."""
    return ExitReport(rank, kind, text, time.time())
