"""Pictures as inline SVG: curves, a heat map, a time line.

Colours are classes (`c0` to `c7`, `muted`, ...), so the page says how they look on a light and on
a dark background. Coordinates have one decimal: less than an eye can tell, and short.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from hybrid_train.tracking.thinning import highest, thin

WIDTH, HEIGHT = 540, 250  # of a picture of curves, in units of its own
COLUMNS = 480  # of it, of which each shows the lowest and the highest point
LEVELS = 12  # of the colours of a heat map
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 530, 10, 206  # where the axes are
_HEAT_COLUMNS, _HEAT_LEFT, _HEAT_WIDTH, _ROW = 160, 70, 1080, 13
_TIME_WIDTH, _BAR = 1080, 26
_MOST_TIMES = 9  # labels of a time line
_NEAR_END = 18  # of the right side; a label there would be cut off if it were centred
_LOG_ABOVE = 30.0  # a curve whose highest point is so many times its median is shown by decades
_DECADES_ALONE = 2  # so many of them or more need no labels in between
Show = Callable[[float], str]


@dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes:
        xs: growing.
        ys: as many.
        style: classes, of which one is a colour: "c0 faint", "c1 dots".
    """

    xs: Sequence[float]
    ys: Sequence[float]
    style: str


@dataclass(frozen=True)
class Axes:
    """How a picture of curves is labelled.

    Attributes:
        show: writes a value.
        show_x: writes a place below the picture.
        below: writes a second line below it, smaller.
        from_zero: whether the picture begins at 0 below.
        marks: upright lines: place, class, what they are.
    """

    show: Show
    show_x: Show
    below: Show | None = None
    from_zero: bool = False
    marks: Sequence[tuple[float, str, str]] = field(default_factory=tuple)


def curves(lines: Sequence[Curve], axes: Axes, name: str) -> str:
    """Draw curves over each other; the name is for those who cannot see the picture."""
    points = [(thin(line.xs, line.ys, COLUMNS), line.style) for line in lines]
    heights = [y for some, _ in points for _, y in some if math.isfinite(y)]
    places = [x for some, _ in points for x, _ in some]
    if not heights:
        return ""
    low, high, by_decades = _range(heights, from_zero=axes.from_zero)
    first, last = min(places), max(places)
    across = _scale(first, last if last > first else first + 1, _LEFT, _RIGHT)
    plain = _scale(_log(low), _log(high), _BOTTOM, _TOP) if by_decades else None
    up = (lambda y: plain(_log(y))) if plain else _scale(low, high, _BOTTOM, _TOP)
    parts = [*_grid(low, high, up, axes, by_decades=by_decades)]
    parts += _places(first, last, across, axes)
    for place, style, text in axes.marks:
        if first <= place <= last:
            x = _short(across(place))
            parts.append(
                f'<path class="mark {style}" d="M{x} {_TOP}V{_BOTTOM}"><title>{escape(text)}'
                "</title></path>"
            )
    for some, style in points:
        parts += _line([(across(x), up(y) if math.isfinite(y) else y) for x, y in some], style)
    return _picture(WIDTH, HEIGHT, parts, name)


def _picture(width: float, height: float, parts: Iterable[str], name: str) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">'
    return "".join([head, *parts, "</svg>"])


def _range(heights: Sequence[float], *, from_zero: bool) -> tuple[float, float, bool]:
    """Return lowest and highest value of a picture, and whether decades are the same height."""
    low, high = min(heights), max(heights)
    middle = sorted(heights)[len(heights) // 2]
    if low > 0 and not from_zero and high > _LOG_ABOVE * middle:
        return low, high, True
    if from_zero:
        low = min(0.0, low)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin, False


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    return place


def _log(value: float) -> float:
    return math.log10(value)


def _grid(
    low: float, high: float, up: Callable[[float], float], axes: Axes, *, by_decades: bool
) -> Iterable[str]:
    values = _decades(low, high) if by_decades else ticks(low, high, 5)
    for value in values:
        y = _short(up(value))
        yield f'<path class="grid" d="M{_LEFT} {y}H{_RIGHT}"/>'
        text = escape(axes.show(value))
        yield f'<text class="end" x="{_LEFT - 5}" y="{y}" dy=".33em">{text}</text>'


def _places(
    first: float, last: float, across: Callable[[float], float], axes: Axes
) -> Iterable[str]:
    for value in ticks(first, last, 6):
        x = _short(across(value))
        side = "end" if across(value) > _RIGHT - _NEAR_END else "middle"
        yield f'<path class="grid" d="M{x} {_BOTTOM}v4"/>'
        yield f'<text class="{side}" x="{x}" y="{_BOTTOM + 17}">{escape(axes.show_x(value))}</text>'
        if axes.below is not None:
            below = escape(axes.below(value))
            yield f'<text class="{side} small" x="{x}" y="{_BOTTOM + 32}">{below}</text>'


def _line(points: Sequence[tuple[float, float]], style: str) -> Iterable[str]:
    """Yield a path, broken where a value is not finite, or a dot for each point."""
    if "dots" in style.split():
        for x, y in points:
            if math.isfinite(y):
                yield f'<circle class="{style}" cx="{_short(x)}" cy="{_short(y)}" r="2.6"/>'
    path, pen_up = [], True
    for x, y in points:
        if math.isfinite(y):
            path.append(f"{'M' if pen_up else 'L'}{_short(x)} {_short(y)}")
        pen_up = not math.isfinite(y)
    yield f'<path class="line {style}" d="{"".join(path)}"/>'


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return about as many round numbers between two values as are wanted."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (1, 2, 5, 10) if step * power >= rough) * power
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + number) * step for number in range(count)]


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(_log(low)), math.ceil(_log(high)) + 1)
    within = (1,) if _log(high) - _log(low) >= _DECADES_ALONE else (1, 2, 5)
    found = [factor * 10.0**power for power in powers for factor in within]
    return [value for value in found if low <= value <= high]


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Row:
    """One row of a heat map."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def heat_map(rows: Sequence[Row], show_x: Show, show: Show, name: str) -> str:
    """Draw rows of colours, the highest value of each column; the scale is below.

    Cells of one colour are one path, and neighbours one cell, so that the picture stays small.
    """
    places = [x for row in rows for x in row.xs]
    first, last = min(places), max(places)
    last = last if last > first else first + 1
    count = int(min(_HEAT_COLUMNS, max(1, max(len(row.xs) for row in rows))))
    edges = [first + (last - first) * number / count for number in range(count + 1)]
    table = [highest(row.xs, row.ys, edges) for row in rows]
    known = [value for cells in table for value in cells if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    width = (_HEAT_WIDTH - _HEAT_LEFT) / count
    paths: list[list[str]] = [[] for _ in range(LEVELS)]
    parts = []
    for number, (row, cells) in enumerate(zip(rows, table, strict=True)):
        y = number * _ROW
        for level, start, end in _stretches(cells, low, high):
            x, wide = _HEAT_LEFT + start * width, (end - start) * width
            paths[level].append(f"M{_short(x)} {y}h{_short(wide)}v{_ROW - 1}h-{_short(wide)}z")
        parts.append(
            f'<text class="end small" x="{_HEAT_LEFT - 6}" y="{y + _ROW / 2}" dy=".33em">'
            f"{escape(row.name)}</text>"
        )
    parts += [f'<path class="h{n}" d="{"".join(d)}"/>' for n, d in enumerate(paths) if d]
    bottom = len(rows) * _ROW
    across = _scale(first, last, _HEAT_LEFT, _HEAT_WIDTH)
    for value in ticks(first, last, 10):
        text = escape(show_x(value))
        parts.append(f'<text class="middle" x="{_short(across(value))}" y="{bottom + 15}">{text}')
        parts.append("</text>")
    parts += _colours(low, high, bottom + 26, show)
    return _picture(_HEAT_WIDTH + 20, bottom + 44, parts, name)


def _stretches(
    cells: Sequence[float | None], low: float, high: float
) -> Iterable[tuple[int, int, int]]:
    """Yield level, start and end of neighbours with one colour."""
    levels = [None if value is None else _level(value, low, high) for value in cells]
    start = 0
    for number in range(1, len(levels) + 1):
        if number == len(levels) or levels[number] != levels[start]:
            level = levels[start]
            if level is not None:
                yield level, start, number
            start = number


def _level(value: float, low: float, high: float) -> int:
    """Return the colour of a value; equal factors are equal steps, as loads are ratios."""
    if high <= low:
        return 0
    share = math.log(value / low) / math.log(high / low) if low > 0 else value / high
    return min(LEVELS - 1, int(share * LEVELS))


def _colours(low: float, high: float, y: float, show: Show) -> Iterable[str]:
    wide = 14
    left = _HEAT_WIDTH - LEVELS * wide - 60
    yield f'<text class="end" x="{left - 6}" y="{y + 6}" dy=".33em">{escape(show(low))}</text>'
    for level in range(LEVELS):
        yield f'<path class="h{level}" d="M{left + level * wide} {y}h{wide}v12h-{wide}z"/>'
    end = left + LEVELS * wide + 6
    yield f'<text x="{end}" y="{y + 6}" dy=".33em">{escape(show(high))}</text>'


@dataclass(frozen=True)
class Span:
    """A part of a time line, in seconds from its start."""

    start: float
    end: float
    style: str
    label: str
    text: str


def time_line(spans: Sequence[Span], show: Show, name: str) -> str:
    """Draw spans along one line of time; each keeps a width that can be seen."""
    end = max(max((span.end for span in spans), default=1.0), 1e-9)
    across = _scale(0, end, 4, _TIME_WIDTH - 4)
    parts = [f'<path class="grid" d="M4 {_BAR / 2 + 4}H{_TIME_WIDTH - 4}"/>']
    for span in spans:
        x, wide = across(span.start), max(1.5, across(span.end) - across(span.start))
        parts.append(
            f'<rect class="{span.style}" x="{_short(x)}" y="4" width="{_short(wide)}" '
            f'height="{_BAR}" rx="2"><title>{escape(span.text)}</title></rect>'
        )
        if wide > 9 * len(span.label):
            parts.append(
                f'<text class="on middle" x="{_short(x + wide / 2)}" y="{_BAR / 2 + 4}" '
                f'dy=".35em">{escape(span.label)}</text>'
            )
    for value in _round_times(end):
        x = across(value)
        side = "start" if value == 0 else "end" if x > _TIME_WIDTH - _NEAR_END else "middle"
        place = f'x="{_short(x)}" y="{_BAR + 23}"'
        parts.append(f'<path class="grid" d="M{_short(x)} {_BAR + 6}v4"/>')
        parts.append(f'<text class="{side}" {place}>{escape(show(value))}</text>')
    return _picture(_TIME_WIDTH, _BAR + 30, parts, name)


def _round_times(end: float) -> list[float]:
    """Return times from 0 to the end that are round as clocks are."""
    steps = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 28800, 86400)
    days = (86400 * days for days in (2, 5, 10, 20, 50, 100, 200, 500))
    step = next((one for one in (*steps, *days) if end / one <= _MOST_TIMES), end)
    return [number * step for number in range(int(end / step) + 1)]
