"""Gateway to plotly: figures as plain data, which plotly.js draws in the page of a report.

A figure is what plotly takes: traces and a layout. What the page itself decides stands in the
`meta` of a trace, for `jobs/report.js`: names of colours, which are those of a light or of a dark
page; which smoothing it belongs to; of which run its steps are, so that tokens can stand in their
place. A curve of any length becomes few points, but a spike of one step among a hundred thousand
stays where it is and as high as it is.
"""

import html
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from plotly.offline import get_plotlyjs

from hybrid_train.tracking import metrics
from hybrid_train.tracking.metrics import LONGEST_WINDOW

Points = list[tuple[float, float]]
# How curves are smoothed, by the choice in the page: over how many of `n` steps that a run has.
EACH_STEP, AS_REPORTED = "each step", "avg loss"
_SHARES = {"2 % of the run": 0.02, "10 % of the run": 0.1}
SMOOTHINGS = (EACH_STEP, AS_REPORTED, *_SHARES)
_HEAT_COLUMNS, _HEAT_ROW_PX, _HEAT_SCALE_PX, _HEAT_REST_PX = 160, 16, 56, 110
_LOG_ABOVE = 30.0  # a curve whose highest point is so many times its median is shown by decades
_DECADES_ALONE = 3  # so many of them or more need no labels in between
_DIGITS = 5  # of a value in the file; what is under the pointer has no more
_HAIR = 1e-6  # so that the ends of a scale are within it
_LOAD_TICKS = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)  # of expert loads
_LINE_LETTERS = 44  # letters of a line under the pointer
_MOST_TIMES = 6  # labels of a time line, which must fit on a telephone

Figure = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        steps: growing.
        values: as many.
        label: under the pointer.
        key: of all that one entry of a legend switches.
        colour: "c0" to "c7" or "muted".
        dash: as plotly calls it.
        run: number of the run in the page.
        smooths: whether the page may smooth it.
        faint: whether each step stays behind the smoothed line.
        dots: whether a mark stands at each value.
        first: value that is drawn first; means are taken over those before it, too.
    """

    steps: Sequence[float]
    values: Sequence[float]
    label: str
    key: str
    colour: str
    dash: str = "solid"
    run: int = 0
    smooths: bool = False
    faint: bool = False
    dots: bool = False
    first: int = 0


@dataclass(frozen=True)
class Axes:
    """How a figure of curves is labelled.

    Attributes:
        form: of a value, as d3 writes it: ".4f".
        from_zero: whether the figure begins at 0 below.
        log: whether its upper axis may be logarithmic.
        marks: upright lines: step, colour, what they are.
    """

    form: str
    from_zero: bool = False
    log: bool = False
    marks: Sequence[tuple[float, str, str]] = field(default_factory=tuple)


def library() -> str:
    """Return plotly.js as one script, which needs nothing else."""
    return get_plotlyjs()


def curves(lines: Sequence[Curve], axes: Axes, columns: int) -> Figure | None:
    """Draw curves over each other; None if there is nothing to draw.

    Args:
        lines: the curves.
        axes: how they are labelled.
        columns: of the figure, of which each shows the lowest and the highest step of a curve.
    """
    heights = [y for line in lines for y in line.values[line.first :] if math.isfinite(y)]
    if not heights:
        return None
    traces = [trace for line in lines for trace in _traces(line, axes, columns)]
    places = [x for line in lines for x in line.steps[line.first :]]
    traces += _marks(axes.marks, min(places), max(places))
    is_log = axes.log and _needs_log(heights)
    positive = [height for height in heights if height > 0] or [1.0]
    decades = math.log10(max(positive) / min(positive))
    return {
        "data": traces,
        "log_dtick": "D2" if decades < _DECADES_ALONE else 1,  # D2 labels 1, 2 and 5
        "layout": {
            "hovermode": "x unified",
            "xaxis": {"rangemode": "normal"},
            "yaxis": {
                "type": "log" if is_log else "linear",
                "rangemode": "tozero" if axes.from_zero else "normal",
            },
            "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        },
    }


def _needs_log(heights: Sequence[float]) -> bool:
    middle = sorted(heights)[len(heights) // 2]
    return min(heights) > 0 and max(heights) > _LOG_ABOVE * middle


def _traces(line: Curve, axes: Axes, columns: int) -> Iterator[Figure]:
    """Yield each step of a curve, and its means by every way to smooth it."""
    each = EACH_STEP if line.smooths else None
    steps = line.steps[line.first :]
    yield _trace(line, axes, thin(steps, line.values[line.first :], columns), each)
    if line.smooths:
        number = len(line.values)
        for name in SMOOTHINGS[1:]:
            means = metrics.smoothed_curve(line.values, longest(name, number))
            yield _trace(line, axes, sampled(steps, means[line.first :], columns), name)


def longest(smoothed: str, number: int) -> int:
    """Return over how many steps a curve of `number` steps is averaged at the most."""
    share = _SHARES.get(smoothed)
    return LONGEST_WINDOW if share is None else max(1, round(share * number))


def thin(xs: Sequence[float], ys: Sequence[float], columns: int) -> Points:
    """Keep at most two points of each column, in the order in which they came.

    Args:
        xs: growing.
        ys: as many; what is not finite becomes one NaN a column, where a curve is broken.
        columns: width of the figure in points that an eye can tell apart.

    Returns:
        Points; all of them, if there are at most two a column anyway.
    """
    pairs = list(zip(xs, ys, strict=True))
    if len(pairs) <= 2 * columns:
        return pairs
    first, last = pairs[0][0], pairs[-1][0]
    scale = columns / (last - first)

    def column(pair: tuple[float, float]) -> int:
        return min(columns - 1, int((pair[0] - first) * scale))

    found: Points = []
    for _, group in groupby(pairs, column):
        members = list(group)
        finite = [pair for pair in members if math.isfinite(pair[1])]
        kept = {min(finite, key=_height), max(finite, key=_height)} if finite else set()
        found += sorted(kept)
        if len(finite) < len(members):
            found.append((members[-1][0], math.nan))
    return found


def _height(pair: tuple[float, float]) -> float:
    return pair[1]


def sampled(xs: Sequence[float], ys: Sequence[float], number: int) -> Points:
    """Keep about so many points, equally far apart, and the last: enough for what is smooth."""
    every = max(1, -(-len(xs) // number))
    places = [*range(0, len(xs) - 1, every), *([len(xs) - 1] if len(xs) else [])]
    return [(xs[place], ys[place]) for place in places]


def _trace(
    line: Curve, axes: Axes, points: Sequence[tuple[float, float]], smoothed: str | None
) -> Figure:
    meta = {"run": line.run, "colour": line.colour, "key": line.key}
    if smoothed is not None:
        meta |= {"smoothing": smoothed, "faint": line.faint and smoothed == EACH_STEP}
    return {
        "type": "scatter",
        "mode": "lines+markers" if line.dots else "lines",
        "x": [_short(x) for x, _ in points],
        "y": [_short(y) for _, y in points],
        "name": _plain(line.label),
        "line": {"width": 1.6, "dash": line.dash},
        "marker": {"size": 5},
        "hovertemplate": f"%{{y:{axes.form}}}  %{{text}}",
        "meta": meta,
    }


def _marks(marks: Sequence[tuple[float, str, str]], first: float, last: float) -> Iterator[Figure]:
    """Yield upright lines, those of one colour as one trace."""
    inside = [mark for mark in marks if first <= mark[0] <= last]
    for colour in dict.fromkeys(colour for _, colour, _ in inside):
        own = [(place, text) for place, of, text in inside if of == colour]
        yield {
            "type": "scatter",
            "mode": "lines",
            "x": [x for place, _ in own for x in (place, place, None)],
            "y": [y for _ in own for y in (0, 1, None)],
            "text": [t for _, text in own for t in (_lines(text), _lines(text), "")],
            "yaxis": "y2",
            "name": "",
            "line": {"width": 1, "dash": "dot"},
            "opacity": 0.75,
            "hovertemplate": "%{text}<extra></extra>",
            "meta": {"run": 0, "colour": colour, "own_text": True},
        }


def _plain(text: str) -> str:
    """Escape a text, since plotly.js reads some tags."""
    return html.escape(text, quote=False)


def _lines(text: str) -> str:
    """Break a text into lines that fit on a telephone."""
    return "<br>".join(_plain(line) for line in textwrap.wrap(text, _LINE_LETTERS))


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{_DIGITS}g}") if value != int(value) else value
    return int(rounded) if rounded == int(rounded) else rounded


@dataclass(frozen=True)
class Row:
    """One row of a heat map."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def heat_map(rows: Sequence[Row]) -> Figure | None:
    """Draw rows of colours, the highest value of each column; None if there is nothing to draw."""
    places = [x for row in rows for x in row.steps]
    if not places:
        return None
    first, last = min(places), max(places)
    count = int(min(_HEAT_COLUMNS, max(1, max(len(row.steps) for row in rows))))
    width = (last - first) / count or 1.0
    edges = [first + width * number for number in range(count + 1)]
    table = [highest(row.steps, row.values, edges) for row in rows]
    known = [value for cells in table for value in cells if value is not None]
    if not known:
        return None
    ticks = _load_ticks(min(known), max(known))
    trace = {
        "type": "heatmap",
        "x": [_short(edge + width / 2) for edge in edges[:-1]],
        "y": [_plain(row.name) for row in rows],
        # Equal factors are equal steps of colour, as loads are ratios.
        "z": [[v and _short(math.log(v)) for v in cells] for cells in table],
        "zmin": math.log(ticks[0]) - _HAIR,
        "zmax": math.log(ticks[-1]) + _HAIR,
        "customdata": [[v and _short(v) for v in cells] for cells in table],
        "hovertemplate": "%{y}, %{x:,.4~s}: %{customdata:.2f}<extra></extra>",
        "hoverongaps": False,
        "xgap": 0,
        "ygap": 1,
        "colorbar": {
            "orientation": "h", "thickness": 10, "len": 0.5, "x": 1, "xanchor": "right", "y": 1,
            "yanchor": "bottom", "outlinewidth": 0,
            "tickvals": [math.log(tick) for tick in ticks],
            "ticktext": [f"{tick:.2f}" for tick in ticks],
        },
        "meta": {"run": 0, "heat": True},
    }  # fmt: skip
    layout = {
        "height": _HEAT_ROW_PX * len(rows) + _HEAT_REST_PX,
        "margin": {"t": _HEAT_SCALE_PX},
        "xaxis": {"ticks": "", "title": {"text": ""}},  # on so low a figure it would hide the ticks
        "yaxis": {
            "autorange": "reversed", "ticks": "", "type": "category", "automargin": True,
            "nticks": len(rows),
        },
        "hovermode": "closest",
    }  # fmt: skip
    return {"data": [trace], "layout": layout}


def highest(xs: Sequence[float], ys: Sequence[float], edges: Sequence[float]) -> list[float | None]:
    """Return the highest value of each column of a table; None where a column has none.

    Args:
        xs: growing.
        ys: as many.
        edges: of the columns, growing; the last edge belongs to the last column.
    """
    found: list[float | None] = [None] * (len(edges) - 1)
    column = 0
    for x, y in zip(xs, ys, strict=True):
        while column < len(found) - 1 and x >= edges[column + 1]:
            column += 1
        if math.isfinite(y):
            before = found[column]
            found[column] = y if before is None else max(before, y)
    return found


def _load_ticks(low: float, high: float) -> list[float]:
    """Return both ends of a scale, and round values that are not too near to them."""
    room = (high / low) ** 0.15 if low > 0 else 1.0
    inside = [tick for tick in _LOAD_TICKS if low * room <= tick <= high / room]
    return sorted({low, *inside, high})


@dataclass(frozen=True)
class Span:
    """A part of a time line, in seconds from its start."""

    start: float
    end: float
    colour: str
    label: str
    text: str


def time_line(spans: Sequence[Span], show: Callable[[float], str]) -> Figure:
    """Draw spans along one line of time; each keeps a border that can be seen."""
    end = max(max((span.end for span in spans), default=1.0), 1e-9)
    times = round_times(end)
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [""] * len(spans),
        "base": [_short(span.start) for span in spans],
        "x": [_short(span.end - span.start) for span in spans],
        "text": [_plain(span.label) for span in spans],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "constraintext": "none",
        "hovertext": [_lines(span.text) for span in spans],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"line": {"width": 1.5}},
        "meta": {"colours": [span.colour for span in spans]},
    }
    layout = {
        "height": 84,
        "hovermode": "closest",
        "bargap": 0.1,
        "uniformtext": {"mode": "hide", "minsize": 10},
        "xaxis": {"tickvals": times, "ticktext": [show(one) for one in times], "range": [0, end]},
        "yaxis": {"visible": False, "fixedrange": True},
    }
    return {"data": [trace], "layout": layout}


def round_times(end: float) -> list[float]:
    """Return times from 0 to the end that are round as clocks are."""
    steps = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 28800, 86400)
    days = (86400 * days for days in (2, 5, 10, 20, 50, 100, 200, 500))
    step = next((one for one in (*steps, *days) if end / one <= _MOST_TIMES), end)
    return [number * step for number in range(int(end / step) + 1)]
