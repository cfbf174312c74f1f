"""The job `report`: one HTML file about a run that opens anywhere, without a network."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_train import __version__
from hybrid_train.config.secrets import masked, masked_data
from hybrid_train.jobs.report_pictures import Picture, pictures, style_of
from hybrid_train.jobs.run_state import RunState, look
from hybrid_train.jobs.status import (
    ATTEMPT_HEADS,
    attempt_row,
    came_from,
    event_row,
    last_metrics,
    moment,
    progress,
)
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.report import ReportJob
from hybrid_train.schema.units import counted, show_bytes
from hybrid_train.tracking import svg
from hybrid_train.tracking.metrics import show_duration
from hybrid_train.tracking.page import drawn, fill
from hybrid_train.tracking.summary import summarise

TEMPLATE = Path(__file__).with_name("report.html")
FILE_NAME = "report.html"
_NAMES = {
    "validation_loss": "validation loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "tokens/s",
    "step_time_s": "a step",
    "mfu": "MFU",
}
_MOST_ROWS = 200  # of a table, the newest


@dataclass(frozen=True)
class Table:
    """Rows with a title."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def run(job: ReportJob) -> None:
    """Write the report of a run and say where it is.

    Raises:
        UserError: if there is no run in the folder, a file in it is damaged, or the report cannot
            be written.
    """
    run_dir = Path(job.run_dir)
    target = Path(job.output) if job.output else run_dir / FILE_NAME
    with contextlib.suppress(OSError):  # what stands in the way is said as it is written
        if target.is_dir():
            raise UserError(f"output = {target} is a folder; name a file: {target / FILE_NAME}")
    text = report(look(run_dir))
    half = target.with_name(f"{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(text, encoding="utf-8")
        half.replace(target)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}; name another file: output=..."
        ) from error
    print(f"{target} ({show_bytes(len(text.encode()))})")  # noqa: T201  the result


def report(state: RunState) -> str:
    """Return the page of a run."""
    state = _without_credentials(state)
    found = list(pictures(state))
    return fill(
        TEMPLATE,
        title=state.run_dir.resolve().name,
        state=state.state,
        state_style=style_of(state.state).replace("no-sign-of-life", "silent"),
        why=state.why,
        subtitle=_subtitle(state),
        progress=progress(state),
        share=state.progress,
        facts=list(_facts(state)),
        pictures=[_as_markup(picture) for picture in found],
        levels=svg.LEVELS,
        time=_time(state),
        time_title=_time_title(state),
        tables=[one for one in (_attempts(state), _events(state), _origin(state)) if one.rows],
        summary=masked(summarise(state.run_dir)) if state.lines else "No step was done.",
        config=state.config_text,
        footer=_footer(),
    )


def _without_credentials(state: RunState) -> RunState:
    """Mask what was written by another version, or by hand."""
    return replace(
        state,
        why=masked(state.why),
        attempts=[masked_data(one) for one in state.attempts],
        events=masked_data(list(state.events)),
        config=masked_data(state.config),
        config_text=masked(state.config_text),
    )


def _as_markup(picture: Picture) -> Picture:
    return replace(picture, svg=drawn(picture.svg))


def _subtitle(state: RunState) -> str:
    """Say what is trained: pattern, format, batch, processes."""
    config = state.config

    def of(*path: str) -> Any:
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    parts = [
        f"pattern {of('model', 'pattern')}",
        f"hidden size {of('model', 'hidden_size')}",
        f"{of('precision', 'format')}",
        f"{of('train', 'global_batch')} x {of('train', 'sequence_length')} tokens a step",
    ]
    if state.attempts:
        parts.append(counted(state.attempts[-1].processes, "process"))
    return "  ·  ".join(parts)


def _facts(state: RunState) -> Iterator[tuple[str, str]]:
    """Yield the figures at the head of the page."""
    yield "steps", f"{state.step:,}"
    for name, text in last_metrics(state):
        yield _NAMES.get(name, name), text
    if state.goodput is not None:
        yield "goodput", f"{state.goodput.share:.1%}"
    if state.attempts:
        yield "attempts", str(len(state.attempts))
    if state.seconds_left is not None:
        yield "left", show_duration(state.seconds_left)


def _time(state: RunState) -> list[dict[str, Any]]:
    measured = state.goodput
    if measured is None or measured.wall_s <= 0:
        return []
    return [
        {
            "name": part,
            "share": seconds / measured.wall_s,
            "took": show_duration(seconds),
            "meaning": measured.meaning(part),
        }
        for part, seconds in measured.seconds.items()
        if seconds > 0 or part == "productive"
    ]


def _time_title(state: RunState) -> str:
    measured = state.goodput
    if measured is None:
        return ""
    return (
        f"Goodput {measured.share:.1%}: {show_duration(measured.seconds['productive'])} of "
        f"{show_duration(measured.wall_s)} from the first start to the last end."
    )


def _attempts(state: RunState) -> Table:
    rows = [attempt_row(one, with_place=True) for one in state.attempts]
    return Table("History of attempts", ATTEMPT_HEADS, rows[-_MOST_ROWS:], _cut(len(rows)))


def _events(state: RunState) -> Table:
    rows = [event_row(event) for event in state.events]
    heads = ("time, UTC", "event", "details")
    return Table("Events", heads, rows[-_MOST_ROWS:], _cut(len(rows)))


def _origin(state: RunState) -> Table:
    return Table("What the newest attempt came from", (), list(came_from(state)))


def _cut(number: int) -> str:
    return f"The last {_MOST_ROWS} of {number}." if number > _MOST_ROWS else ""


def _footer() -> str:
    return (
        f"Written by hybrid-train {__version__}, {moment(time.time())} UTC. Curves show, of each "
        f"of {svg.COLUMNS} columns, the lowest and the highest step, so that no spike is lost; "
        "strong lines are means over 3 % of the steps. Upright lines: grey where an attempt "
        "began, red where an update was skipped, orange other events; point at one to read it."
    )
