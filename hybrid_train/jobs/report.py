"""The job `report`: a page with the curves of one run or of several (gateway to Jinja2).

`page_of_run` fills the template for one run, `page_of_runs` for several. All text in a page is
escaped but for scripts: ours and plotly.js, which a page may run by their hashes and no others.
"""

import base64
import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hybrid_train import __version__
from hybrid_train.config.secrets import masked, masked_data
from hybrid_train.jobs.report_figures import Picture, columns, compared, pictures, style, style_of
from hybrid_train.jobs.run_state import RunState, failures, runs_named, show_or_dash
from hybrid_train.jobs.status import (
    ATTEMPT_HEADS,
    attempt_row,
    came_from,
    event_row,
    last_metrics,
    moment,
    progress,
)
from hybrid_train.schema.job_roots import ReportJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_bytes
from hybrid_train.tracking import plotly
from hybrid_train.tracking.console import summarise
from hybrid_train.tracking.metrics import LONGEST_WINDOW, show_duration

TEMPLATE = Path(__file__).with_name("report.html")
SCRIPT = Path(__file__).with_name("report.js")
# What is compared first comes first: on a telephone the rest is out of sight.
_LAST_HEADS = (
    "run", "avg loss", "val loss", "steps", "tokens", "state", "gradient norm", "tokens/s",
    "a step", "MFU", "time of steps", "goodput",
)  # fmt: skip
_NOT_COMPARED = ("run_dir",)  # differs always
_MISSING = object()  # of a key that a config does not have
FILE_NAME = "report.html"
_FACT_NAMES = {
    "smoothed_loss": "avg loss",
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
    """Rows with a title; `colours` are those of the runs that the rows are about."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    colours: Sequence[str] = ()
    numbers: bool = False  # whether all but the first column are short


@dataclass(frozen=True)
class Text:
    """A text as it stands, with its title."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Content:
    """What stands in a page, from its head to its end; what is empty is left out."""

    title: str
    subtitle: str
    state: str = ""
    state_style: str = ""
    why: str = ""
    progress: str = ""
    share: float | None = None
    facts: Sequence[tuple[str, str]] = ()
    first_tables: Sequence[Table] = ()  # before the pictures
    pictures: Sequence[Picture] = ()
    knows_time: bool = False  # whether it says where the time went, or that nobody knows
    time: Sequence[Mapping[str, Any]] = ()
    time_title: str = ""
    tables: Sequence[Table] = ()
    texts: Sequence[Text] = field(default_factory=tuple)


def run(job: ReportJob) -> None:
    """Write the report of a run, or of several, and say where it is.

    Raises:
        UserError: if there is no run in a folder, a file of the only one is damaged, or the report
            cannot be written.
    """
    runs = runs_named(job.run_dir)
    place = next(iter(runs.folders.values())) if runs.alone else runs.place
    target = Path(job.output) if job.output else place / FILE_NAME
    with contextlib.suppress(OSError):  # what stands in the way is said as it is written
        if target.is_dir():
            raise UserError(f"output = {target} is a folder; name a file: {target / FILE_NAME}")
    states, left_out = runs.look()
    if runs.alone:
        text = page_of_run(next(iter(states.values())))
    else:
        text = page_of_runs(states, left_out, runs.place)
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


def page_of_run(state: RunState) -> str:
    """Return the page of a run."""
    state = without_credentials(state)
    summary = masked(summarise(state.run_dir)) if state.lines else "No step was done."
    return render_page(
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
        yield _FACT_NAMES.get(name, name), text
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


def page_of_runs(states: Mapping[str, RunState], left_out: Mapping[str, str], place: Path) -> str:
    """Return the page of several runs.

    Args:
        states: by the names of the runs.
        left_out: why others cannot be read, by their names.
        place: the folder that has them all.
    """
    states = {name: without_credentials(state) for name, state in states.items()}
    troubles = [*failures(states.items()), *((name, masked(why)) for name, why in left_out.items())]
    tables = [_differences(states)]
    if troubles:
        tables.append(Table("Failed, or left out", ("run", "why"), troubles))
    return render_page(
        Content(
            title=place.resolve().name or str(place),
            subtitle=f"{len(states)} run{'s' * (len(states) != 1)} in {place}",
            first_tables=[_last_values(states)],
            pictures=list(compared(states)),
            tables=tables,
        ),
        list(states.values()),
    )


def _last_values(states: Mapping[str, RunState]) -> Table:
    rows = [tuple(_values(name, state)) for name, state in states.items()]
    colours = [style(number)[0] for number in range(len(states))]
    return Table("Last values", _LAST_HEADS, rows, colours=colours, numbers=True)


def _values(name: str, state: RunState) -> Iterator[str]:
    yield name
    yield show_or_dash("smoothed_loss", state.smoothed_loss)
    yield show_or_dash("validation_loss", state.last_of("validation_loss"))
    yield f"{state.step:,}"
    yield show_or_dash("tokens", state.tokens)
    yield state.state
    for metric in ("grad_norm", "tokens_per_s", "step_time_s", "mfu"):
        yield show_or_dash(metric, state.last_of(metric))
    times = (line.get("step_time_s", 0.0) for line in state.lines)
    yield show_duration(sum(seconds for seconds in times if math.isfinite(seconds)))
    share = state.goodput.share if state.goodput else math.nan
    yield f"{share:.1%}" if math.isfinite(share) else "-"


def _differences(states: Mapping[str, RunState]) -> Table:
    """Return the table of the settings that differ; the shorter of runs and settings are across."""
    found = differing([state.config for state in states.values()])
    title = "Settings that differ"
    if not found:
        note = "None: these runs have the same config." if len(states) > 1 else "There is one run."
        return Table(title, (), (), note)
    colours = [style(number)[0] for number in range(len(states))]
    if len(found) > len(states):
        rows = [(key, *values) for key, values in found.items()]
        return Table(title, ("setting", *states), rows, numbers=True)
    rows = [
        (name, *(values[number] for values in found.values())) for number, name in enumerate(states)
    ]
    return Table(title, ("run", *found), rows, colours=colours, numbers=True)


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all configs, with the value in each."""
    flat = [dict(_settings(config)) for config in configs]
    keys = sorted({key for one in flat for key in one})
    values = {key: [one.get(key, _MISSING) for one in flat] for key in keys}
    return {
        key: [_written(value) for value in of_key]
        for key, of_key in values.items()
        if key not in _NOT_COMPARED and any(value != of_key[0] for value in of_key)
    }


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _written(value: Any) -> str:
    if value is _MISSING:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def render_page(content: Content, states: Sequence[RunState]) -> str:
    """Return a page as HTML.

    Args:
        content: what stands in it.
        states: the runs whose curves are in it, in the order of their numbers.
    """
    library, own = plotly.library(), SCRIPT.read_text(encoding="utf-8")
    return fill_template(
        TEMPLATE,
        page=content,
        data=as_json(
            {
                "figures": [picture.figure for picture in content.pictures],
                "runs": [positions(state.lines) for state in states],
                "each": plotly.EACH_STEP,
            }
        ),
        smoothings=plotly.SMOOTHINGS,
        chosen=plotly.AS_REPORTED,
        over="tokens" if len(states) > 1 else "steps",
        library=as_script(library),
        own=as_script(own),
        hashes=[script_hash(library), script_hash(own)],
        footer=_footer(len(states)),
    )


def positions(lines: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return tokens over steps as the corners of a line, by which a page turns one into the other.

    As long as the batch stays as it is there are two.
    """
    corners: list[tuple[float, float]] = [(0, 0)]
    for line in lines:
        here = (line["step"], line.get("tokens", 0))
        if len(corners) > 1 and _slope(corners[-2], corners[-1]) == _slope(corners[-1], here):
            corners[-1] = here
        else:
            corners.append(here)
    return {"steps": [step for step, _ in corners], "tokens": [seen for _, seen in corners]}


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / ((second[0] - first[0]) or 1)


def without_credentials(state: RunState) -> RunState:
    """Mask what was written by another version, or by hand."""
    return replace(
        state,
        why=masked(state.why),
        attempts=[masked_data(one) for one in state.attempts],
        events=masked_data(list(state.events)),
        config=masked_data(state.config),
        config_text=masked(state.config_text),
    )


def _footer(runs: int) -> str:
    marks = (
        " Upright lines: grey where an attempt began, red where an update was skipped, orange "
        "other events."
    )
    return (
        f"Written by hybrid-train {__version__}, {moment(time.time())} UTC. A curve of more than "
        f"{2 * columns(runs):,} steps shows, of each of {columns(runs):,} columns, the lowest and "
        f"the highest step, so that no spike is lost; means keep {columns(runs):,} points. The avg "
        f"loss is the mean over a tenth of the steps so far, {LONGEST_WINDOW} at the most."
        f"{marks if runs == 1 else ''} Zoom with the mouse, back with a double click; a click on a "
        "name hides its curve."
    )


def fill_template(template: Path, **content: Any) -> str:
    """Fill a template.

    Args:
        template: the file.
        content: by the names that it uses; all but scripts and data is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**content)


def as_script(text: str) -> Markup:
    """Mark a script of our own, or of a library, as one; it stands in the page as it is."""
    return Markup(text)


def script_hash(text: str) -> str:
    """Return how a Content-Security-Policy names a script that stands in the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def as_json(value: Any) -> Markup:
    """Write plain data as JSON that no text in it can break out of."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))
