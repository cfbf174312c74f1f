"""The job `status`: how a run is, on one screen, or as JSON for scripts."""

import datetime
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from hybrid_train.config.secrets import masked_data
from hybrid_train.jobs.help import console, table
from hybrid_train.jobs.run_state import RunState, runs_named, show_runs
from hybrid_train.schema.job_roots import StatusJob
from hybrid_train.schema.units import show_bytes, show_tokens
from hybrid_train.tracking.goodput import Goodput
from hybrid_train.tracking.history import RUNNING, Attempt
from hybrid_train.tracking.metrics import show, show_duration

_SHOWN = 10  # attempts and events, the newest
_METRICS = (
    "loss",
    "smoothed_loss",
    "validation_loss",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "step_time_s",
    "mfu",
)
_DETAIL = 160  # characters of an event
_ORIGIN = {"command", "code", "machines", "libraries"}
ATTEMPT_HEADS = ("attempt", "began", "took", "steps", "processes", "ended", "why")


def run(job: StatusJob) -> None:
    """Print the state of a run, or a line for each of several.

    Raises:
        UserError: if there is no run in a folder, or a file of the only run is damaged.
    """
    runs = runs_named(job.run_dir)
    states, left_out = runs.look()
    if job.json:
        listed = [as_data(state) for state in states.values()]
        data = listed[0] if runs.alone else {"runs": listed, "left_out": masked_data(left_out)}
        print(json.dumps(data, indent=1, allow_nan=False))  # noqa: T201  the result
    elif runs.alone:
        _show(next(iter(states.values())))
    else:
        show_runs(console(), states, left_out)


def _show(state: RunState) -> None:
    """Print all that there is to say of one run."""
    page = console()
    page.print(table(_facts(state)))
    if state.goodput is not None:
        page.print("\nWhere the time went")
        page.print(table(_time(state.goodput)))
    if state.attempts:
        _title(page, "Attempts", len(state.attempts))
        rows = [attempt_row(one) for one in state.attempts[-_SHOWN:]]
        page.print(table(rows, ATTEMPT_HEADS))
    if state.events:
        _title(page, "Events", len(state.events))
        page.print(table(event_row(event) for event in state.events[-_SHOWN:]))


def _title(page: Any, name: str, number: int) -> None:
    shown = f"the last {_SHOWN} of {number}" if number > _SHOWN else f"{number}"
    page.print(f"\n{name} ({shown})")


def _facts(state: RunState) -> Iterator[tuple[str, str]]:
    """Yield what is known about a run, a line each."""
    yield "run", str(state.run_dir)
    yield "state", f"{state.state}{': ' * bool(state.why)}{state.why}"
    yield "progress", progress(state)
    if state.last:
        yield "last metrics", "  ".join(f"{name} {text}" for name, text in last_metrics(state))
    found = state.checkpoint
    yield "checkpoint", f"step {found.step} ({found.path})" if found else "none yet"
    yield from came_from(state)
    measured = state.goodput
    if measured is not None:
        yield "goodput", f"{measured.share:.1%} of {show_duration(measured.wall_s)}"
    else:
        yield "goodput", "not known: no attempt stands in history.jsonl"


def came_from(state: RunState) -> Iterator[tuple[str, str]]:
    """Yield code, machines and libraries of the newest attempt that says them, a line each."""
    said = (one.provenance for one in reversed(state.attempts))
    known = next((one for one in said if one.keys() >= _ORIGIN), None)
    if known is None:
        return
    yield "command", known["command"]
    own = known.get("working_folder")
    beside = f"; working folder {_commit(own)}" if own else ""
    yield "code", f"hybrid_train {known['code']['version']}, {_commit(known['code'])}{beside}"
    yield "machines", "; ".join(_machine(one) for one in known["machines"])
    versions = {name: said for name, said in known["libraries"].items() if said}
    yield "libraries", ", ".join(f"{name} {said}" for name, said in versions.items())


def _commit(code: Mapping[str, Any]) -> str:
    if not code.get("commit"):
        return "of no commit that is known"
    state = {True: ", changed since", False: "", None: ", not known whether changed since"}
    return f"commit {code['commit'][:12]}{state[code.get('dirty')]}"


def _machine(one: Mapping[str, Any]) -> str:
    gpus = "".join(
        f", {kind['count']} x {kind['name']} ({show_bytes(kind['memory_bytes'])})"
        for kind in one["gpus"]
    )
    memory = show_bytes(one["memory_bytes"])
    return f"{one['count']} x {one['cores']} cores {one['processor']}, {memory}{gpus}"


def progress(state: RunState) -> str:
    """Say how far a run is and how long it will take."""
    of = f" of {show_tokens(state.total_tokens)}" if state.total_tokens else ""
    text = f"step {state.step}, {show_tokens(state.tokens)}{of} tokens"
    if state.progress is not None:
        text += f" ({state.progress:.1%})"
    if state.seconds_left is not None:
        text += f", {show_duration(state.seconds_left)} left"
    return text


def last_metrics(state: RunState) -> Iterator[tuple[str, str]]:
    """Yield name and newest value of the metrics that matter most."""
    for name in _METRICS:
        value = state.smoothed_loss if name == "smoothed_loss" else state.last_of(name)
        if value is not None:
            yield name, show(name, value) if math.isfinite(value) else "not finite"


def _time(measured: Goodput) -> Iterator[tuple[str, str, str]]:
    for part, seconds in measured.seconds.items():
        share = seconds / measured.wall_s if measured.wall_s > 0 else 0.0
        if seconds > 0 or part == "productive":
            yield f"{share:6.1%}", show_duration(seconds), measured.meaning(part)


def attempt_row(one: Attempt, *, with_place: bool = False) -> tuple[str, ...]:
    """Return number, start, length, steps, processes, end and cause of an attempt.

    Args:
        one: the attempt.
        with_place: add the host of rank 0 and the job of SLURM.
    """
    took = "" if one.end is None else show_duration(one.end - one.start)
    last = "" if one.end_step is None else str(one.end_step)
    nodes = f" on {one.nodes} nodes" if (one.nodes or 1) > 1 else ""
    places = [one.host, *([f"job {one.job}"] if one.job else [])]
    where = f" ({', '.join(filter(None, places))})" if with_place and any(places) else ""
    outcome = one.outcome if not one.kind or one.kind == one.outcome else one.kind
    ranks = f" (ranks {', '.join(map(str, one.ranks))})" if one.ranks else ""
    return (
        str(one.number),
        moment(one.start),
        took,
        f"{one.start_step} to {last}",
        f"{one.processes}{nodes}{where}",
        f"{one.outcome}, {outcome}" if outcome != one.outcome else outcome,
        f"{one.cause}{ranks}",
    )


def event_row(event: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return time, name and details of an event, shortened."""
    details = {key: value for key, value in event.items() if key not in ("time", "event", "step")}
    step = f"step {event['step']}: " if "step" in event else ""
    text = "; ".join(f"{key} {_in_words(value)}" for key, value in details.items())
    text = step + text if text else step.removesuffix(": ")
    short = text if len(text) <= _DETAIL else f"{text[: _DETAIL - 3]}..."
    return str(event["time"])[:19].replace("T", " "), str(event["event"]), short


def _in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def moment(seconds: float) -> str:
    """Write a moment in UTC."""
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return when.strftime("%Y-%m-%d %H:%M:%S")


def as_data(state: RunState) -> dict[str, Any]:
    """Return the state as plain data; what is not finite becomes null, credentials are masked."""
    measured = state.goodput
    found = state.checkpoint
    data = {
        "run_dir": str(state.run_dir),
        "state": state.state,
        "why": state.why,
        "running": state.state == RUNNING,
        "step": state.step,
        "tokens": state.tokens,
        "total_tokens": state.total_tokens,
        "progress": state.progress,
        "seconds_left": state.seconds_left,
        "seconds_since_last_sign": state.silent_s,
        "metrics": state.last,
        "smoothed_loss": state.smoothed_loss,
        "checkpoint": {"step": found.step, "path": str(found.path)} if found else None,
        "goodput": None
        if measured is None
        else {
            "share": measured.share,
            "wall_s": measured.wall_s,
            "seconds": dict(measured.seconds),
            "not_told_by_the_files": list(measured.unknown),
        },
        "attempts": [asdict(one) for one in state.attempts],
        "events": list(state.events),
    }
    plain: dict[str, Any] = _finite(masked_data(data))
    return plain


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list) else data
