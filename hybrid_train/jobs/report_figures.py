"""The figures of a report: which metrics of a run, or of several, are drawn, and how."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hybrid_train.jobs.run_state import SILENT, RunState
from hybrid_train.jobs.status import attempt_row, event_row, moment
from hybrid_train.tracking import metrics, plotly
from hybrid_train.tracking.goodput import SKIPPED
from hybrid_train.tracking.history import RUNNING
from hybrid_train.tracking.metrics import show, show_duration
from hybrid_train.tracking.plotly import Axes, Curve, Figure

_COLOURS = 8
_DASHES = ("solid", "dash", "dot")  # for each round of the colours
_MOST_MARKS = 300  # upright lines of a figure, the newest
_BEGINNING = 0.1  # share of the steps, in which losses fall so far that the rest looks flat
_LONG = 50  # steps of a run that has such a rest
_FEW = 120  # values that still have a mark each
_STYLES = {SILENT: "silent"}  # of states whose name is no colour
_COLUMNS, _ALL_COLUMNS, _FEWEST_COLUMNS = 1000, 6000, 150  # of a curve; of all; at the least
_LOSS, _LOG_LOSS = Axes(".4f"), Axes(".4f", log=True)
_SHORT = {"tokens_per_s": "tokens/s", "grad_norm": "norm", "lr": "rate"}  # under the pointer
METRICS = (
    ("tokens_per_s", "Throughput, tokens/s", Axes(".4s", from_zero=True)),
    ("grad_norm", "Gradient norm, before clipping", Axes(".3f", log=True)),
    ("lr", "Learning rate", Axes(".3e", from_zero=True, log=True)),
)
_COLOUR_OF = {"finished": "good", "failed": "bad", "stopped": "warn", "silent": "warn"}


@dataclass(frozen=True)
class Entry:
    """One entry of a legend: what it switches, how its line looks, what it says."""

    key: str
    colour: str
    dash: str
    label: str


@dataclass(frozen=True)
class Picture:
    """A figure with its title and its legend."""

    title: str
    figure: Figure
    legend: Sequence[Entry] = ()
    wide: bool = False
    note: str = ""
    log: bool = False  # whether the upper axis can be switched


class Series:
    """The metrics of a run as columns.

    Attributes:
        run: number of the run in the page.
        name: of the run.
        names: of its metrics.
    """

    def __init__(self, run: int, name: str, lines: Sequence[Mapping[str, float]]) -> None:
        self.run, self.name = run, name
        self._lines = lines
        self.names = sorted({name for line in lines for name in line})

    def of(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of the lines that have a metric."""
        having = [line for line in self._lines if name in line]
        return [line["step"] for line in having], [line[name] for line in having]

    def family(self, prefix: str) -> list[str]:
        """List the metrics whose names begin so, numbers in their order."""
        found = [name for name in self.names if name.startswith(prefix)]
        return sorted(found, key=lambda name: (_number(name), name))

    def loads(self) -> list[str]:
        """List the metrics of the loads of experts, MTP blocks last."""
        names = [name for name in self.family("expert_load_") if "_mtp_" not in name]
        return [*names, *self.family("expert_load_mtp_")]

    def busiest(self) -> tuple[list[float], list[float]]:
        """Return steps and the highest load of any layer."""
        names = self.loads()
        having = [line for line in self._lines if any(name in line for name in names)]
        values = [max(line[name] for name in names if name in line) for line in having]
        return [line["step"] for line in having], values


def _number(name: str) -> int:
    last = name.rpartition("_")[2]
    return int(last) if last.isdecimal() else 0


def columns(runs: int) -> int:
    """Return the columns of a curve: fewer in a page of many runs, so that it opens."""
    return max(_FEWEST_COLUMNS, min(_COLUMNS, _ALL_COLUMNS // max(1, runs)))


def style(number: int) -> tuple[str, str]:
    """Return colour and dashes of a run or a source."""
    return f"c{number % _COLOURS}", _DASHES[number // _COLOURS % len(_DASHES)]


def pictures(state: RunState) -> Iterator[Picture]:
    """Yield what can be drawn of a run, the most telling first."""
    series = Series(0, state.run_dir.name, state.lines)
    if state.lines:
        marks = _marks(state)
        yield from _losses(series, marks)
        yield from _sources(series, "loss/", "Loss of each source", marks)
        yield from _sources(series, "validation_loss/", "Validation loss of each source", marks)
        for name, title, axes in METRICS:
            curve = _curve(series, name, _SHORT[name], "c0", smooths=name != "lr")
            yield from _picture(title, [replace(curve, faint=True)], replace(axes, marks=marks))
        yield from _evaluations(series, marks)
        yield from _expert_loads(series)
    if state.attempts:
        yield _attempts(state)


def compared(states: Mapping[str, RunState]) -> Iterator[Picture]:
    """Yield what can be drawn of several runs over each other."""
    runs = [Series(n, name, one.lines) for n, (name, one) in enumerate(states.items())]
    yield from _over_each_other(runs, "loss", "Loss, nats per token", _LOG_LOSS)
    yield from _later(runs)
    yield from _over_each_other(runs, "validation_loss", "Validation loss", _LOG_LOSS)
    for prefix, title in (("mtp_loss_", "Loss at MTP depth"), ("loss/", "Loss of source")):
        for name in sorted({name for run in runs for name in run.family(prefix)}):
            yield from _over_each_other(runs, name, f"{title} {name.removeprefix(prefix)}", _LOSS)
    for name in sorted({name for run in runs for name in run.family("validation_loss/")}):
        source = name.removeprefix("validation_loss/")
        yield from _over_each_other(runs, name, f"Validation loss of source {source}", _LOSS)
    for name, title, axes in METRICS:
        yield from _over_each_other(runs, name, title, axes)
    loads = [_of_run(run, "expert_load_1", *run.busiest()) for run in runs if run.loads()]
    yield from _picture("Expert load, the busiest layer", loads, Axes(".2f"), columns(len(runs)))


def _over_each_other(
    runs: Sequence[Series], name: str, title: str, axes: Axes
) -> Iterator[Picture]:
    lines = [_of_run(run, name, *run.of(name)) for run in runs if name in run.names]
    yield from _picture(title, lines, axes, columns(len(runs)))


def _of_run(run: Series, name: str, steps: list[float], values: list[float]) -> Curve:
    """Return the curve of a run among others, in the colour that the run has everywhere."""
    colour, dash = style(run.run)
    is_measured = not name.startswith("validation") and name != "lr"
    return Curve(
        steps, values, run.name, f"run{run.run}", colour, dash, run.run,
        smooths=is_measured, dots=not is_measured and len(steps) <= _FEW,
    )  # fmt: skip


def _later(runs: Sequence[Series]) -> Iterator[Picture]:
    """Yield the losses without the beginning, in which they fall too far to see the rest."""
    lines = [_of_run(run, "loss", *run.of("loss")) for run in runs if "loss" in run.names]
    lines = [_without_beginning(line) for line in lines if len(line.steps) >= _LONG]
    title = f"Loss from {_BEGINNING:.0%} of the steps of each run on"
    yield from _picture(title, lines, _LOG_LOSS, columns(len(runs)))


def _picture(
    title: str, lines: Sequence[Curve], axes: Axes, width: int = _COLUMNS,
    legend: Sequence[Entry] | None = None,
) -> Iterator[Picture]:  # fmt: skip
    """Yield the picture of some curves, unless there is nothing to draw."""
    figure = plotly.curves([line for line in lines if line.steps], axes, width)
    if figure is None:
        return
    entries = [_entry(line, axes) for line in lines] if len(lines) > 1 else []
    yield Picture(title, figure, entries if legend is None else legend, log=axes.log)


def _entry(line: Curve, axes: Axes) -> Entry:
    """Return the entry of a curve, with its last value."""
    finite = (value for value in reversed(line.values) if math.isfinite(value))
    last = metrics.smoothed_loss(line.values) if line.smooths else next(finite, math.nan)
    form = {".4s": lambda v: show("tokens_per_s", v), ".3e": "{:.2e}".format}.get(
        axes.form, "{:.3f}".format
    )
    return Entry(line.key, line.colour, line.dash, f"{line.label} {form(last)}")


def _curve(
    series: Series, name: str, label: str, colour: str, *, smooths: bool, dash: str = "solid"
) -> Curve:
    steps, values = series.of(name)
    dots = not smooths and name != "lr" and len(steps) <= _FEW
    return Curve(steps, values, label, label, colour, dash, smooths=smooths, dots=dots)


def _losses(series: Series, marks: Sequence[tuple[float, str, str]]) -> Iterator[Picture]:
    """Yield the losses of a run, and those of train and validation without the beginning."""
    train = replace(_curve(series, "loss", "train", "c0", smooths=True), faint=True)
    if not train.steps:
        return
    own = [train]
    if "validation_loss" in series.names:
        own.append(_curve(series, "validation_loss", "validation", "c1", smooths=False))
    others = []
    for number, name in enumerate(series.family("mtp_loss_")):
        colour, dash = style(number + 2)
        label = f"MTP depth {_number(name)}"
        others.append(_curve(series, name, label, colour, smooths=True, dash=dash))
    unigram = series.of("unigram_loss")[1]
    if unigram:
        ends = [train.steps[0], train.steps[-1]]
        level = [unigram[-1]] * len(ends)
        others.append(Curve(ends, level, "unigram", "unigram", "muted", "dash"))
    axes = replace(_LOG_LOSS, marks=marks)
    legend = [_entry(line, axes) for line in [*own, *others]]
    yield from _picture("Loss, nats per token", [*others, *own], axes, legend=legend)
    if len(train.steps) >= _LONG:
        title = f"The same from {_BEGINNING:.0%} of the steps on"
        later = [_without_beginning(line) for line in own]
        yield from _picture(title, later, axes, legend=legend[: len(own)])


def _without_beginning(line: Curve) -> Curve:
    begin = line.steps[0] + _BEGINNING * (line.steps[-1] - line.steps[0])
    place = bisect_left(line.steps, begin)
    return replace(line, first=place)


def _sources(
    series: Series, prefix: str, title: str, marks: Sequence[tuple[float, str, str]]
) -> Iterator[Picture]:
    lines = []
    for number, name in enumerate(name for name in series.names if name.startswith(prefix)):
        colour, dash = style(number)
        source, smooths = name.removeprefix(prefix), not prefix.startswith("validation")
        lines.append(_curve(series, name, source, colour, smooths=smooths, dash=dash))
    axes = replace(_LOSS, marks=marks)
    yield from _picture(title, lines, axes, legend=[_entry(line, axes) for line in lines])


def _evaluations(series: Series, marks: Sequence[tuple[float, str, str]]) -> Iterator[Picture]:
    """Yield a picture of each metric of evaluation, with a curve for each task that has it."""
    names = series.family("evaluation/")
    for metric in dict.fromkeys(name.rpartition("/")[2] for name in names):
        lines = []
        for number, name in enumerate(one for one in names if one.endswith(f"/{metric}")):
            colour, dash = style(number)
            task = name.split("/")[1]
            lines.append(_curve(series, name, task, colour, smooths=False, dash=dash))
        axes = Axes(".4f", marks=marks)
        legend = [_entry(line, axes) for line in lines]
        title = f"Evaluation, {metric.replace('_', ' ')}"
        yield from _picture(title, lines, axes, legend=legend)


def _expert_loads(series: Series) -> Iterator[Picture]:
    rows = [
        plotly.Row(f"{'MTP ' if '_mtp_' in name else ''}layer {_number(name)}", *series.of(name))
        for name in series.loads()
    ]
    figure = plotly.heat_map(rows)
    if figure is not None:
        yield Picture(
            "Expert load by layer", figure, wide=True,
            note="Tokens of the busiest expert over the mean of all, the highest of each column; "
            "1.00 is perfect balance. Colours are equal factors.",
        )  # fmt: skip


def _marks(state: RunState) -> Sequence[tuple[float, str, str]]:
    """List where attempts began and what happened beside them."""
    found = [
        (one.start_step, "soft", f"attempt {one.number} went on from step {one.start_step}")
        for one in state.attempts[1:]
    ]
    for event in state.events:
        step = event.get("step")
        if isinstance(step, int):
            _, name, details = event_row(event)
            found.append((step, "bad" if name == SKIPPED else "warn", f"{name}: {details}"))
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
        outcome = style_of(state.state) if one.outcome == RUNNING else one.outcome
        text = "; ".join(
            filter(None, (f"attempt {one.number}", *attempt_row(one, with_place=True)[1:]))
        )
        colour = _COLOUR_OF.get(outcome, "run")
        spans.append(plotly.Span(one.start - begin, end - begin, colour, str(one.number), text))
    figure = plotly.time_line(spans, show_duration)
    note = f"From {moment(begin)} UTC. Green finished, blue runs, orange stopped, red failed."
    return Picture("Attempts", figure, wide=True, note=note)
