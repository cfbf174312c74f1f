"""The job `report`: one HTML file about runs that opens anywhere, without a network.

What it says of one run stands here, what of several in `jobs/report_runs.py`; both fill one page.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid_train.config.secrets import masked
from hybrid_train.jobs.report_figures import pictures, style_of
from hybrid_train.jobs.report_page import Content, Table, Text, page, without_credentials
from hybrid_train.jobs.report_runs import comparison
from hybrid_train.jobs.run_list import named
from hybrid_train.jobs.run_state import RunState
from hybrid_train.jobs.status import (
    ATTEMPT_HEADS,
    attempt_row,
    came_from,
    event_row,
    last_metrics,
    progress,
)
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.report import ReportJob
from hybrid_train.schema.units import counted, show_bytes
from hybrid_train.tracking.metrics import show_duration
from hybrid_train.tracking.summary import summarise

FILE_NAME = "report.html"
_NAMES = {
    "smoothed_loss": "avg loss",
    "validation_loss": "validation loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "tokens/s",
    "step_time_s": "a step",
    "mfu": "MFU",
}
_MOST_ROWS = 200  # of a table, the newest


def run(job: ReportJob) -> None:
    """Write the report of a run, or of several, and say where it is.

    Raises:
        UserError: if there is no run in a folder, a file of the only one is damaged, or the report
            cannot be written.
    """
    runs = named(job.run_dir)
    place = next(iter(runs.folders.values())) if runs.alone else runs.place
    target = Path(job.output) if job.output else place / FILE_NAME
    with contextlib.suppress(OSError):  # what stands in the way is said as it is written
        if target.is_dir():
            raise UserError(f"output = {target} is a folder; name a file: {target / FILE_NAME}")
    states, left_out = runs.look()
    if runs.alone:
        text = report(next(iter(states.values())))
    else:
        text = comparison(states, left_out, runs.place)
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
    state = without_credentials(state)
    summary = masked(summarise(state.run_dir)) if state.lines else "No step was done."
    return page(
        Content(
            title=state.run_dir.resolve().name,
            state=state.state,
            state_style=style_of(state.state),
            why=state.why,
            subtitle=_subtitle(state),
            progress=progress(state),
            share=state.progress,
            facts=list(_facts(state)),
            pictures=list(pictures(state)),
            tables=[one for one in (_attempts(state), _events(state), _origin(state)) if one.rows],
            time=_time(state),
            time_title=_time_title(state),
            knows_time=True,
            texts=[Text("Summary", summary), Text("Config", state.config_text, folded=True)],
        ),
        [state],
    )


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
