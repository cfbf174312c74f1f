"""The pictures of a report: which metrics of a run are drawn, and how."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_train.jobs.run_state import SILENT, RunState
from hybrid_train.jobs.status import attempt_row, event_row, moment
from hybrid_train.schema.units import show_tokens
from hybrid_train.tracking import svg
from hybrid_train.tracking.goodput import SKIPPED
from hybrid_train.tracking.history import RUNNING
from hybrid_train.tracking.metrics import show_duration
from hybrid_train.tracking.plots import smoothed

_SMOOTH_SHARE = 0.03  # of the steps, that a smoothed curve is the mean over
_COLOURS = 8
_SHAPES = ("", " dashed", " dotted")  # for each round of the colours
_MOST_MARKS = 300  # upright lines of a picture, the newest
_BEGINNING = 0.1  # share of the steps, in which losses fall so far that the rest looks flat
_ZOOMED = 50  # steps of a run that has such a rest
_STYLES = {SILENT: "silent"}  # of states whose name is no class


@dataclass(frozen=True)
class Picture:
    """A picture with its title; the legend has a class and a name for each curve."""

    title: str
    svg: Any
    legend: Sequence[tuple[str, str]] = ()
    wide: bool = False
    note: str = ""


class Series:
    """The metrics of a run as columns."""

    def __init__(self, lines: Sequence[Mapping[str, float]]) -> None:
        self._lines = lines
        self.names = sorted({name for line in lines for name in line})
        self._steps = [line["step"] for line in lines]
        self._tokens = [line.get("tokens", math.nan) for line in lines]

    def of(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of the lines that have a metric."""
        having = [line for line in self._lines if name in line]
        return [line["step"] for line in having], [line[name] for line in having]

    def family(self, prefix: str) -> list[str]:
        """List the metrics whose names begin so, numbers in their order."""
        found = [name for name in self.names if name.startswith(prefix)]
        return sorted(found, key=lambda name: (_number(name), name))

    def tokens_at(self, step: float) -> str:
        """Write how many tokens were seen at a step."""
        place = bisect_right(self._steps, step) - 1
        return show_tokens(self._tokens[place]) if place >= 0 else "0"


def _number(name: str) -> int:
    last = name.rpartition("_")[2]
    return int(last) if last.isdecimal() else 0


def pictures(state: RunState) -> Iterator[Picture]:
    """Yield what can be drawn of a run, the most telling first."""
    series = Series(state.lines)
    if state.lines:
        marks = _marks(state)
        yield from _losses(series, marks)
        yield from _sources(series, "loss/", "Loss of each source", marks)
        yield from _sources(series, "validation_loss/", "Validation loss of each source", marks)
        yield from _plain(series, "tokens_per_s", "Throughput, tokens/s", marks, from_zero=True)
        yield from _plain(series, "grad_norm", "Gradient norm, before clipping", marks)
        yield from _plain(series, "lr", "Learning rate", marks, from_zero=True, smooth=False)
        yield from _expert_loads(series)
    if state.attempts:
        yield _attempts(state)


def _axes(series: Series, name: str, marks: Sequence[Any], *, from_zero: bool = False) -> svg.Axes:
    return svg.Axes(
        show=lambda value: _label(name, value),
        show_x=lambda step: f"{step:,.0f}" if step < 10_000 else show_tokens(step),  # noqa: PLR2004
        below=lambda step: f"{series.tokens_at(step)} tok",
        from_zero=from_zero,
        marks=marks,
    )


def _label(name: str, value: float) -> str:
    """Write a round value beside a picture, as short as can be."""
    if value == 0:
        return "0"
    if name == "tokens_per_s":
        return show_tokens(value)
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _losses(series: Series, marks: Sequence[Any]) -> Iterator[Picture]:
    steps, values = series.of("loss")
    if not steps:
        return
    lines = [svg.Curve(steps, values, "c0 faint"), svg.Curve(steps, _smooth(values), "c0")]
    legend = [("c0", f"train {_last(_smooth(values))}")]
    for number, name in enumerate(series.family("mtp_loss_")):
        style = _style(number + 2)
        places, depth = series.of(name)
        lines.insert(0, svg.Curve(places, _smooth(depth), style))
        legend.append((style, f"MTP depth {_number(name)} {_last(_smooth(depth))}"))
    places, held_out = series.of("validation_loss")
    if places:
        dots = " dots" if len(places) <= svg.COLUMNS // 4 else ""
        lines.append(svg.Curve(places, held_out, f"c1{dots}"))
        legend.insert(1, ("c1", f"validation {_last(held_out)}"))
    places, unigram = series.of("unigram_loss")
    if places:
        ends = [steps[0], steps[-1]]
        lines.insert(0, svg.Curve(ends, [unigram[-1]] * len(ends), "muted dashed"))
        legend.append(("muted dashed", f"unigram {_last(unigram)}"))
    axes = _axes(series, "loss", marks)
    yield Picture("Loss, nats per token", svg.curves(lines, axes, "loss over steps"), legend)
    begin = steps[0] + _BEGINNING * (steps[-1] - steps[0])
    own = [line for line in lines if line.style.split()[0] in ("c0", "c1")]
    later = svg.curves([_from(line, begin) for line in own], axes, "loss after the beginning")
    if later and len(steps) >= _ZOOMED:
        yield Picture(
            f"The same from {_BEGINNING:.0%} of the steps on", later, legend[: len(own) - 1]
        )


def _from(line: svg.Curve, begin: float) -> svg.Curve:
    """Leave out what is before a step."""
    place = bisect_left(line.xs, begin)
    return svg.Curve(line.xs[place:], line.ys[place:], line.style)


def _sources(series: Series, prefix: str, title: str, marks: Sequence[Any]) -> Iterator[Picture]:
    names = [name for name in series.names if name.startswith(prefix)]
    lines, legend = [], []
    for number, name in enumerate(names):
        steps, values = series.of(name)
        values = values if prefix.startswith("validation") else _smooth(values)
        # A line of one point would not be seen.
        dots = " dots" if len(steps) <= svg.COLUMNS // 4 else ""
        lines.append(svg.Curve(steps, values, _style(number) + dots))
        legend.append((_style(number), f"{name.removeprefix(prefix)} {_last(values)}"))
    drawn = svg.curves(lines, _axes(series, "loss", marks), title) if lines else ""
    if drawn:
        yield Picture(title, drawn, legend)


def _plain(
    series: Series, name: str, title: str, marks: Sequence[Any], *,
    from_zero: bool = False, smooth: bool = True,
) -> Iterator[Picture]:  # fmt: skip
    """Yield the picture of one metric: each step faint, the mean of its neighbours strong."""
    steps, values = series.of(name)
    lines = [svg.Curve(steps, values, "c0 faint" if smooth else "c0")]
    if smooth:
        lines.append(svg.Curve(steps, _smooth(values), "c0"))
    drawn = svg.curves(lines, _axes(series, name, marks, from_zero=from_zero), title)
    if drawn:
        yield Picture(title, drawn)


def _smooth(values: Sequence[float]) -> list[float]:
    return smoothed(values, round(_SMOOTH_SHARE * len(values)))


def _style(number: int) -> str:
    return f"c{number % _COLOURS}{_SHAPES[number // _COLOURS % len(_SHAPES)]}"


def _last(values: Sequence[float]) -> str:
    last = next((value for value in reversed(values) if math.isfinite(value)), math.nan)
    return f"{last:.3f}"


def _expert_loads(series: Series) -> Iterator[Picture]:
    names = [name for name in series.family("expert_load_") if "_mtp_" not in name]
    names += series.family("expert_load_mtp_")
    rows = [
        svg.Row(f"{'MTP ' if '_mtp_' in name else ''}layer {_number(name)}", *series.of(name))
        for name in names
    ]
    drawn = svg.heat_map(
        rows, _axes(series, "", ()).show_x, "{:.2f}".format, "expert loads by layer and step"
    ) if rows else ""  # fmt: skip
    if drawn:
        yield Picture(
            "Expert load by layer", drawn, wide=True,
            note="Tokens of the busiest expert over the mean of all, the highest of each column; "
            "1.00 is perfect balance. Colours are equal factors.",
        )  # fmt: skip


def _marks(state: RunState) -> Sequence[tuple[float, str, str]]:
    """List where attempts began and what happened beside them."""
    found = [
        (one.start_step, "attempt", f"attempt {one.number} went on from step {one.start_step}")
        for one in state.attempts[1:]
    ]
    for event in state.events:
        step = event.get("step")
        if isinstance(step, int):
            _, name, details = event_row(event)
            found.append((step, "skipped" if name == SKIPPED else "other", f"{name}: {details}"))
    return sorted(found)[-_MOST_MARKS:]


def style_of(state: str) -> str:
    """Return the class of a state or an outcome."""
    return _STYLES.get(state, state.replace(" ", "-"))


def _attempts(state: RunState) -> Picture:
    """Draw the attempts by the clock."""
    begin = state.attempts[0].start
    wall = state.goodput.wall_s if state.goodput else 0.0
    spans = []
    for number, one in enumerate(state.attempts):
        following = state.attempts[number + 1 :]
        end = one.end or (following[0].start if following else begin + wall)
        style = style_of(state.state) if one.outcome == RUNNING else one.outcome
        text = "; ".join(
            filter(None, (f"attempt {one.number}", *attempt_row(one, with_place=True)[1:]))
        )
        spans.append(svg.Span(one.start - begin, end - begin, style, str(one.number), text))
    drawn = svg.time_line(spans, show_duration, "attempts by the clock")
    note = f"From {moment(begin)} UTC. Green finished, blue runs, orange stopped, red failed."
    return Picture("Attempts", drawn, wide=True, note=note)
