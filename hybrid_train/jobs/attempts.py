"""One attempt at a run: alone in its folder, noted as it begins, explained when it is over."""

import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hybrid_train.checkpoint import layout
from hybrid_train.jobs import provenance
from hybrid_train.runtime import heartbeat, ranks
from hybrid_train.runtime.heartbeat import Hang, Watchdog
from hybrid_train.schema.problems import UserError, kind_of
from hybrid_train.tracking import exit_reports, history
from hybrid_train.tracking.exit_reports import ExitReport
from hybrid_train.tracking.jsonl import FILE_NAME as METRICS

ALIVE = Path(exit_reports.FOLDER) / "alive.json"  # of rank 0; touched while it lives
TICK_S = 5.0  # how often
_LOST = ("connection closed", "connection reset", "timed out", "broken pipe", "socket", "nccl")


@dataclass
class Attempt:
    """The attempt that this process is part of."""

    run_dir: Path
    number: int
    over: bool = False  # whether its end is in the history
    spoke: bool = False  # whether its exit report counts more than a signal

    def end(self, outcome: str, kind: str, cause: str, found_ranks: tuple[int, ...] = ()) -> None:
        """Note how it ended; one process does."""
        self.over = True
        _note_end(
            self.run_dir, self.number, outcome, exit_reports.Cause(kind, cause, found_ranks, 0)
        )

    def leave(self, kind: str, text: str, seen: Hang | None = None) -> None:
        """Leave the exit report of this process, unless it has left a better one before."""
        if kind == exit_reports.TOLD and self.spoke:
            return
        self.spoke = kind != exit_reports.TOLD
        beat = heartbeat.last()
        report = ExitReport(
            ranks.rank(), kind, text, time.time(), beat.step, beat.part, beat.count,
            waits=seen.waits if seen else False, stack=seen.stack if seen else "",
        )  # fmt: skip
        with suppress(OSError):  # a full disk must not hide what really happened
            exit_reports.leave(self.run_dir, self.number, report)

    def failed(self, error: BaseException) -> None:
        """Note what this process died of; the history has it at once if all died of the same."""
        if self.over:
            return
        alone, known = ranks.world_size() == 1, isinstance(error, UserError)
        lost = not (alone or known) and any(words in str(error).lower() for words in _LOST)
        kind = exit_reports.LOST if lost else kind_of(error)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        all_or_none = getattr(error, "on_all_ranks", False) or alone
        if all_or_none and ranks.is_main():
            self.end(history.FAILED, kind, text)
        else:  # also of what all should have died of: the others may not have
            stack = "".join(traceback.format_exception(error))
            self.leave(kind, text, Hang(heartbeat.last(), 0.0, stack, waits=lost))


@contextmanager
def attempt(run_dir: Path, step: int, hang_timeout_s: float) -> Iterator[Attempt]:
    """Begin an attempt and watch it; every process enters and leaves it.

    Args:
        run_dir: the run folder, claimed by `require_alone` and `conclude` before.
        step: step that it goes on from.
        hang_timeout_s: silence of a process that ends it; 0: any is accepted.
    """
    heartbeat.begin()
    origin = provenance.gathered()
    number = ranks.broadcast_from_main(lambda: _begin(run_dir, step, origin))
    this = Attempt(run_dir, number)
    alive = run_dir / ALIVE

    def on_hang(seen: Hang) -> None:
        text = f"silent for {seen.seconds:.0f} s"
        this.leave(exit_reports.HANG, text, seen)
        sys.stderr.write(f"[rank {ranks.rank()}] {text}, ended by the watchdog:\n{seen.stack}")
        sys.stderr.flush()

    def on_signal(number: signal.Signals, seen: Hang) -> None:
        this.leave(exit_reports.TOLD, f"rank {ranks.rank()} was told to end by {number.name}", seen)

    def tick() -> None:
        if ranks.is_main():
            with suppress(OSError):  # a disk that is away for a while is no reason to stop watching
                os.utime(alive)

    crash = exit_reports.crash_file(run_dir, number, ranks.rank())
    with _crash_log(crash), Watchdog(hang_timeout_s, on_hang, on_signal, tick, TICK_S):
        try:
            yield this
        except BaseException as error:
            this.failed(error)
            raise
    _tidy(this, crash)


def _tidy(this: Attempt, crash: Path) -> None:
    """Leave nothing behind of an attempt that ended in order."""
    crash.unlink(missing_ok=True)
    (crash.with_suffix(".json")).unlink(missing_ok=True)
    if ranks.is_main():
        (this.run_dir / ALIVE).unlink(missing_ok=True)
    with suppress(OSError):  # another process still has a file there
        crash.parent.rmdir()


def _begin(run_dir: Path, step: int, origin: dict[str, Any]) -> int:
    number = 1 + max((one.number for one in history.attempts(history.read(run_dir))), default=0)
    exit_reports.folder(run_dir, number).mkdir(parents=True, exist_ok=True)
    host, job = socket.gethostname(), _slurm_job()
    history.note(
        run_dir, history.ATTEMPT, attempt=number, step=step, processes=ranks.world_size(),
        nodes=max(1, ranks.world_size() // ranks.local_world_size()), host=host, job=job,
        restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), provenance=origin,
    )  # fmt: skip
    me = {"host": host, "pid": os.getpid(), "started": _started(os.getpid()), "job": job}
    (run_dir / ALIVE).write_text(json.dumps(me) + "\n", encoding="utf-8")
    return number


@contextmanager
def _crash_log(path: Path) -> Iterator[IO[str]]:
    """Have Python write where it was if a signal such as SIGSEGV or SIGBUS ends this process.

    SIGUSR2 has it say so without an end: the stacks of all threads go to stderr.
    """
    with path.open("w", encoding="utf-8") as file:
        before = faulthandler.is_enabled()
        faulthandler.enable(file=file)
        faulthandler.register(signal.SIGUSR2, file=sys.__stderr__ or sys.stderr)
        try:
            yield file
        finally:
            faulthandler.unregister(signal.SIGUSR2)
            faulthandler.disable()
            if before:
                faulthandler.enable()


def require_alone(run_dir: Path) -> None:
    """Refuse a folder in which another process trains.

    Raises:
        UserError: naming that process.
    """
    other = _other(run_dir)
    if other is None or not _lives(other, run_dir):
        return
    raise UserError(
        f"{run_dir} is in use: process {other['pid']} on {other['host']} trains there; wait for "
        "it, stop it (kill -USR1 saves first), or choose another run_dir=..."
    )


def _other(run_dir: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((run_dir / ALIVE).read_text(encoding="utf-8"))
        return found if {"host", "pid", "started", "job"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _lives(other: dict[str, Any], run_dir: Path) -> bool:
    if other["host"] == socket.gethostname():
        return _started(other["pid"]) == other["started"] is not None
    if other["job"] is not None and other["job"] == _slurm_job():
        return False  # a job runs again only after its processes are gone
    path = run_dir / ALIVE
    before = path.stat().st_mtime
    if time.time() - before > 12 * TICK_S:
        return False
    time.sleep(2 * TICK_S + 1)
    return path.exists() and path.stat().st_mtime != before


def is_gone(run_dir: Path) -> bool:
    """Tell whether the last process that trained there was on this machine and is no more."""
    other = _other(run_dir)
    return (
        other is not None and other["host"] == socket.gethostname() and not _lives(other, run_dir)
    )


def _started(pid: int) -> str | None:
    """Return when a process of this machine began, in ticks since boot; None if it is gone."""
    try:
        after_name = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if after_name[0] == "Z" else after_name[19]


def _slurm_job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def conclude(run_dir: Path) -> None:
    """Explain the end of the last attempt in the history, if nobody did; it must be over."""
    found = unexplained(run_dir)
    if found is not None:
        number, cause = found
        _note_end(run_dir, number, history.FAILED, cause)


def complete(run_dir: Path) -> None:
    """Note that nothing is left to do, where the last attempt failed.

    It was killed behind its last save, say, or could not copy it; the copy is there by now.
    """
    known = history.attempts(history.read(run_dir))
    if not known or known[-1].outcome != history.FAILED:
        return
    last = known[-1]
    text = f"all tokens are trained; the attempt ended as {last.kind}: {last.cause}"
    cause = exit_reports.Cause("finished", text, (), last.end)
    _note_end(run_dir, last.number, history.FINISHED, cause)


def unexplained(run_dir: Path) -> tuple[int, exit_reports.Cause] | None:
    """Return number and cause of the last attempt if it is over and nobody noted why."""
    known = history.attempts(history.read(run_dir))
    if not known or known[-1].end is not None:
        return None
    last = known[-1]
    beats = [run_dir / ALIVE, run_dir / METRICS]  # a step may be younger than the last tick
    seen = max([last.start, *(path.stat().st_mtime for path in beats if path.exists())])
    reports = exit_reports.read(run_dir, last.number)
    return last.number, exit_reports.cause_of(reports, last.processes, seen)


def _note_end(run_dir: Path, number: int, outcome: str, cause: exit_reports.Cause) -> None:
    newest = layout.latest(run_dir)
    history.note(
        run_dir, history.END, at=cause.time or None, attempt=number,
        step=newest.step if newest else 0, outcome=outcome, kind=cause.kind, cause=cause.text,
        ranks=list(cause.ranks),
    )  # fmt: skip
