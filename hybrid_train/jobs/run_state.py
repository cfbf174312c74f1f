"""How a run is, from the files in its folder: state, progress, attempts; for status and report.

Nothing here needs torch, and nothing is written.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_train.checkpoint import layout
from hybrid_train.config import frozen
from hybrid_train.jobs.attempts import ALIVE, is_gone, unexplained
from hybrid_train.schema.units import is_tokens, tokens
from hybrid_train.tracking import history
from hybrid_train.tracking.goodput import DROPPED, Goodput, goodput
from hybrid_train.tracking.history import Attempt
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.tracking.metrics import show_duration
from hybrid_train.tracking.smoothing import losses_of, smoothed_loss

_RECENT_STEPS = 100  # the rate behind the time left is that of these
# Without a sign of life for so long a run no longer counts as running: a validation or a save may
# take its time, and the first step of a large job comes minutes after its start.
_SILENT_S = 180.0
_SILENT_STEPS = 20  # or for as long as so many steps take, if that is longer
_BESIDE = (history.ATTEMPT, history.END, DROPPED)  # events that stand in the table of attempts

NOT_STARTED, SILENT = "not started", "no sign of life"


@dataclass(frozen=True)
class RunState:
    """What there is to know about a run.

    Attributes:
        run_dir: its folder.
        state: not started, running, no sign of life, finished, stopped or failed.
        why: the state in a sentence; may be empty.
        step: of the last line of its metrics.
        tokens: seen by then.
        total_tokens: of train.tokens; None if the config does not say.
        seconds_left: at the speed of the last steps; None unless it runs.
        silent_s: since the last sign of life; None if there is none.
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
    alive = _last_sign(run_dir, attempts)
    silent = None if alive is None else max(0.0, now - alive)
    done = total_tokens is not None and seen >= total_tokens
    state, why = _state(attempts, lines, silent, done=done)
    if state == history.RUNNING and is_gone(run_dir):
        state, why = _dead(run_dir)
    # A run without a sign of life has not used its time since then.
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


def _last_sign(run_dir: Path, attempts: Sequence[Attempt]) -> float | None:
    """Return when the run was last heard of."""
    files = [run_dir / name for name in (FILE_NAME, history.FILE_NAME, ALIVE)]
    signs = [file.stat().st_mtime for file in files if file.is_file()]
    signs += [one.start for one in attempts[-1:]]
    return max(signs, default=None)


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
