"""The page of a report: what stands in it, and how it is put together."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybrid_train import __version__
from hybrid_train.config.secrets import masked, masked_data
from hybrid_train.jobs.report_figures import Picture, columns
from hybrid_train.jobs.run_state import RunState
from hybrid_train.jobs.status import moment
from hybrid_train.tracking import plotly
from hybrid_train.tracking.page import data, fill, script, script_hash
from hybrid_train.tracking.smoothing import LONGEST

TEMPLATE = Path(__file__).with_name("report.html")
SCRIPT = Path(__file__).with_name("report.js")


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


def page(content: Content, states: Sequence[RunState]) -> str:
    """Return a page as HTML.

    Args:
        content: what stands in it.
        states: the runs whose curves are in it, in the order of their numbers.
    """
    library, own = plotly.library(), SCRIPT.read_text(encoding="utf-8")
    return fill(
        TEMPLATE,
        page=content,
        data=data(
            {
                "figures": [picture.figure for picture in content.pictures],
                "runs": [positions(state.lines) for state in states],
                "each": plotly.EACH_STEP,
            }
        ),
        smoothings=plotly.SMOOTHINGS,
        chosen=plotly.AS_REPORTED,
        over="tokens" if len(states) > 1 else "steps",
        library=script(library),
        own=script(own),
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
        f"loss is the mean over a tenth of the steps so far, {LONGEST} at the most."
        f"{marks if runs == 1 else ''} Zoom with the mouse, back with a double click; a click on a "
        "name hides its curve."
    )
