"""The state of runs, from the files in their folders: of one run, or of all that a command names.

Nothing here needs torch, and nothing is written.
"""

import glob
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_train.checkpoint import layout
from hybrid_train.config import frozen
from hybrid_train.config.frozen import FROZEN_NAME
from hybrid_train.jobs.attempts import ALIVE, is_gone, unexplained
from hybrid_train.jobs.help import show_left_out, show_numbers
from hybrid_train.schema.names import listed_paths
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import is_tokens, tokens
from hybrid_train.tracking import history
from hybrid_train.tracking.goodput import DROPPED, Goodput, goodput
from hybrid_train.tracking.history import FAILED, Attempt
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.tracking.metrics import losses_of, show, show_duration, smoothed_loss

_RECENT_STEPS = 100  # the rate behind the time left is that of these
# Without a heartbeat for so long a run no longer counts as running: a validation or a save may
# take its time, and the first step of a large job comes minutes after its start.
_SILENT_S = 180.0
_SILENT_STEPS = 20  # or for as long as so many steps take, if that is longer
_BESIDE = (history.ATTEMPT, history.END, DROPPED)  # events that stand in the table of attempts

NOT_STARTED, SILENT = "not started", "no heartbeat"
_DEEPEST = 3  # folders between the one that is named and a run; a study has one
RUN_HEADS = ("run", "state", "step", "tokens", "avg loss", "val loss", "tok/s", "left")
_WORD_COLUMNS = 2  # of these columns hold words


@dataclass(frozen=True)
class RunState:
    """What there is to know about a run.

    Attributes:
        run_dir: its folder.
        state: not started, running, no heartbeat, finished, stopped or failed.
        why: the state in a sentence; may be empty.
        step: of the last line of its metrics.
        tokens: seen by then.
        total_tokens: of train.tokens; None if the config does not say.
        seconds_left: at the speed of the last steps; None unless it runs.
        silent_s: since the last heartbeat; None if there is none.
        lines: of its metrics.
        checkpoint: the newest complete one.
        goodput: None if its history has no attempt.
        attempts: oldest first.
        events: what happened beside them, oldest first.
        config: as it is in the folder, plain.
        config_text: the same as text.
    """

    run_dir: Path
    state: str
    why: str
    step: int
    tokens: int
    total_tokens: int | None
    seconds_left: float | None
    silent_s: float | None
    lines: Sequence[dict[str, float]]
    checkpoint: layout.Found | None
    goodput: Goodput | None
    attempts: Sequence[Attempt]
    events: Sequence[dict[str, Any]]
    config: dict[str, Any]
    config_text: str

    @property
    def last(self) -> dict[str, float]:
        """The last line of the metrics; empty before the first step."""
        return self.lines[-1] if self.lines else {}

    @property
    def progress(self) -> float | None:
        """Share of the tokens of the run that were seen; None if their number is not known."""
        return min(1.0, self.tokens / self.total_tokens) if self.total_tokens else None

    @property
    def smoothed_loss(self) -> float | None:
        """The smoothed training loss of the last step; None before the first."""
        losses = losses_of(self.lines)
        return smoothed_loss(losses) if losses else None

    def last_of(self, name: str) -> float | None:
        """Return the newest value of a metric that not every line has."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)


def look(run_dir: Path, now: float | None = None) -> RunState:
    """Read the state of a run.

    Args:
        run_dir: its folder.
        now: seconds since 1970; the clock's, if it is left out.

    Raises:
        UserError: if it is no run folder, or a file in it is damaged.
    """
    now = time.time() if now is None else now
    text, config = frozen.read_frozen(run_dir)
    metrics = run_dir / FILE_NAME
    lines = read_metrics(metrics) if metrics.is_file() else []
    events = history.read(run_dir)
    attempts = history.attempts(events)
    train = config.get("train")
    total = str(train.get("tokens", "")) if isinstance(train, dict) else ""
    total_tokens = tokens(total) if is_tokens(total) else None
    seen = int(lines[-1].get("tokens", 0)) if lines else 0
    alive = _last_heartbeat(run_dir, attempts)
    silent = None if alive is None else max(0.0, now - alive)
    done = total_tokens is not None and seen >= total_tokens
    state, why = _state(attempts, lines, silent, done=done)
    if state == history.RUNNING and is_gone(run_dir):
        state, why = _dead(run_dir)
    # A run without a heartbeat has not used its time since then.
    until = now if state == history.RUNNING or alive is None else alive
    return RunState(
        run_dir=run_dir,
        state=state,
        why=why,
        step=int(lines[-1]["step"]) if lines else 0,
        tokens=seen,
        total_tokens=total_tokens,
        seconds_left=_seconds_left(lines, total_tokens) if state == history.RUNNING else None,
        silent_s=silent,
        lines=lines,
        checkpoint=layout.latest(run_dir),
        goodput=goodput(events, lines, until),
        attempts=attempts,
        events=[event for event in events if event["event"] not in _BESIDE],
        config=config,
        config_text=text,
    )


def _last_heartbeat(run_dir: Path, attempts: Sequence[Attempt]) -> float | None:
    """Return when the run was last heard of."""
    files = [run_dir / name for name in (FILE_NAME, history.FILE_NAME, ALIVE)]
    beats = [file.stat().st_mtime for file in files if file.is_file()]
    beats += [one.start for one in attempts[-1:]]
    return max(beats, default=None)


def _state(
    attempts: Sequence[Attempt],
    lines: Sequence[dict[str, float]],
    silent: float | None,
    *,
    done: bool,
) -> tuple[str, str]:
    """Return the state of a run and why it is in it."""
    if attempts and attempts[-1].outcome != history.RUNNING:
        return attempts[-1].outcome, attempts[-1].cause
    if silent is None:
        return NOT_STARTED, "its config is there, and nothing else"
    if done and not attempts:
        return history.FINISHED, ""
    recent = [line.get("step_time_s", 0.0) for line in lines[-_RECENT_STEPS:]]
    step_s = statistics.median(recent) if recent else 0.0
    if silent <= max(_SILENT_S, _SILENT_STEPS * step_s):
        return history.RUNNING, "" if lines else "no step is done yet"
    after = f"; a step took {step_s:.3g} s" if recent else ", and no step is done"
    return SILENT, f"for {show_duration(silent)}{after}"


def _dead(run_dir: Path) -> tuple[str, str]:
    """Return the state of a run whose process is no more, without an end in its history."""
    found = unexplained(run_dir)
    return history.FAILED, found[1].text if found else "its process is gone"


def _seconds_left(lines: Sequence[dict[str, float]], total: int | None) -> float | None:
    """Estimate the time to the end from the last steps, with the pauses between them."""
    recent = lines[-_RECENT_STEPS:]
    if total is None or not recent or "tokens" not in recent[-1]:
        return None
    before = lines[-_RECENT_STEPS - 1]["tokens"] if len(lines) > _RECENT_STEPS else 0.0
    taken = sum(
        value
        for line in recent
        for name in ("step_time_s", "pause_s")
        if math.isfinite(value := line.get(name, 0.0))
    )
    seen = recent[-1]["tokens"] - before
    return max(0.0, total - recent[-1]["tokens"]) * taken / seen if seen > 0 else None


@dataclass(frozen=True)
class RunList:
    """The runs that a command names.

    Attributes:
        folders: of the runs, by the name that tells them apart; in the order of the names.
        place: the folder that has all of them below it.
        alone: whether one run was asked for, by its own folder.
    """

    folders: Mapping[str, Path]
    place: Path
    alone: bool

    def look(self) -> tuple[dict[str, RunState], dict[str, str]]:
        """Read the states of the runs, and why those that are left out cannot be read.

        Raises:
            UserError: if none can be read.
        """
        states: dict[str, RunState] = {}
        left_out: dict[str, str] = {}
        for name, folder in self.folders.items():
            try:
                states[name] = look(folder)
            except UserError as error:
                if self.alone:
                    raise
                left_out[name] = str(error)
        if not states:
            raise UserError("; ".join(left_out.values()))
        return states, left_out


def runs_named(texts: Sequence[str]) -> RunList:
    """Find the runs that a command line names: run folders, folders of runs, globs.

    Raises:
        UserError: if one of them is no run and has none below it.
    """
    paths = [Path(path) for text in listed_paths(texts) for path in _expanded(text)]
    folders = list(dict.fromkeys(folder for path in paths for folder in _runs_of(path)))
    alone = len(paths) == 1 and folders == paths
    place = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    place = place.parent if len(folders) == 1 else place
    if len(paths) == 1 and not alone:
        place = paths[0]
    names = {os.path.relpath(folder.absolute(), place.absolute()): folder for folder in folders}
    return RunList(
        {name: names[name] for name in sorted(names, key=in_natural_order)}, place, alone
    )


def _expanded(text: str) -> list[str]:
    text = os.path.expanduser(text)
    if os.path.lexists(text) or not glob.has_magic(text):
        return [text]
    found = sorted(glob.glob(text))
    if not found:
        raise UserError(f"run_dir = {text}: nothing matches it")
    return [one for one in found if os.path.isdir(one)] or found


def _runs_of(path: Path) -> list[Path]:
    """Return the path, if it is a run folder, or the run folders below it.

    Raises:
        UserError: if there is none.
    """
    if (path / FROZEN_NAME).is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is no run folder: there is no such folder")
    found = list(_below(path, _DEEPEST))
    if not found:
        raise UserError(
            f"{path} is not a run folder: it has no {FROZEN_NAME}, nor has a folder in it"
        )
    return found


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for one in sorted(folder.iterdir()):
        if not one.is_dir() or one.name.startswith("."):
            continue
        if (one / FROZEN_NAME).is_file():
            yield one  # what a run has written is not searched
        elif depth:
            yield from _below(one, depth - 1)


def in_natural_order(name: str) -> list[tuple[bool, float, str]]:
    """Return what sorts names as people do, 2 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
    return [(n % 2 == 0, float(part) if n % 2 else 0.0, part) for n, part in enumerate(parts)]


def show_runs(page: Console, states: Mapping[str, RunState], left_out: Mapping[str, str]) -> None:
    """Print a line a run, and a sentence for each that failed or cannot be read."""
    show_numbers(
        page, [_run_line(name, one) for name, one in states.items()], RUN_HEADS, words=_WORD_COLUMNS
    )
    for name, why in failures(states.items()):
        page.print(f"\n{name} failed: {why}", soft_wrap=True)
    show_left_out(page, left_out)


def failures(states: Iterable[tuple[str, RunState]]) -> Iterator[tuple[str, str]]:
    """Yield name and cause of the runs that failed."""
    for name, state in states:
        if state.state == FAILED:
            yield name, state.why or "nobody knows why"


def _run_line(name: str, state: RunState) -> tuple[str, ...]:
    left = state.seconds_left
    return (
        name,
        state.state,
        f"{state.step:,}",
        show("tokens", state.tokens),
        show_or_dash("smoothed_loss", state.smoothed_loss),
        show_or_dash("validation_loss", state.last_of("validation_loss")),
        show_or_dash("tokens_per_s", state.last_of("tokens_per_s")),
        "-" if left is None else show_duration(left),
    )


def show_or_dash(name: str, value: float | None) -> str:
    """Write a metric that a run may not have."""
    return show(name, value) if value is not None and math.isfinite(value) else "-"
