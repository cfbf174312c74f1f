"""Pictures: the loss curve of a run, gaps of several runs to a baseline, figures by length."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_train.schema.units import show_tokens
from hybrid_train.tracking.gaps import TAIL, Comparison, Spread
from hybrid_train.tracking.jsonl import read_metrics
from hybrid_train.tracking.metrics import smoothed_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _VALIDATION, _BASELINE = "#2f6fb5", "#d1495b", "#777777"
_MTP = ("#8fb339", "#e09f3e", "#7b5ea7", "#4fb0ae")
_SETTLED = 0.2  # share of training; gaps of losses that still fall fast do not set the scale
_DASHES = ("-", "--", ":")  # for ten curves each, as there are ten colours
_HEIGHT, _PANEL_HEIGHT = 5.2, 3.4  # inches, of a picture of one panel, and of each of several
_NUMBERED = re.compile(r"\w+=[\d.]+(-\d+)?( \w+=[\d.]+(-\d+)?)*")  # groups: "position=64-255"

Points = tuple[list[float], list[float]]  # tokens, values
Figures = Mapping[tuple[str, str], Spread]  # by metric and group


def plot_losses(metrics_jsonl: Path, path: Path, title: str) -> None:
    """Draw the losses over tokens into a PNG; the folder is made.

    Shown are the train loss (each step faint, smoothed strong), the validation loss, the loss of
    each MTP depth, and the unigram cross-entropy as a level to compare with, as far as logged; the
    legend has their last values.

    Args:
        metrics_jsonl: the metrics of the run.
        path: the picture.
        title: name of the run.
    """
    lines = read_metrics(metrics_jsonl)
    with _picture(path) as axes:
        _draw_losses(axes, lines)
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.set_ylabel("cross-entropy, nats per token")
        axes.xaxis.set_major_formatter(lambda value, _: show_tokens(value))
        _decorate(axes)


def plot_gaps(comparisons: Mapping[str, Comparison], baseline: str, path: Path, title: str) -> None:
    """Draw the gaps of variants over training into a PNG; the folder is made.

    Shown are the mean over seeds as a line, lowest to highest as a band, and in grey what the
    seeds of the baseline deviate from each other.

    Args:
        comparisons: of every variant by name, the baseline with itself included.
        baseline: name of the baseline.
        path: the picture.
        title: of the picture.
    """
    with _picture(path, width=11.5) as axes:
        _draw_seeds(axes, comparisons[baseline], baseline)
        others = {name: one for name, one in comparisons.items() if name != baseline}
        for number, (name, one) in enumerate(others.items()):
            _draw_gap(axes, one, name, number)
        axes.set_title(title)
        axes.set_xlabel("share of training, %")
        axes.set_ylabel(f"loss above that of {baseline}, %")
        axes.set_ylim(*_limits(others.values()))
        _decorate(axes)
        # Beside the picture: within it a dozen names would hide the curves.
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(frameon=False, title=f"gap of the {TAIL}", **place)


def plot_figures(variants: Mapping[str, Figures], path: Path, title: str) -> None:
    """Draw figures with numbered groups, "length=256", into a PNG with a panel for each metric.

    There is no picture where there are no such figures. Shown are the mean over seeds as a line,
    lowest to highest as bars. Groups of two numbers, "words=64 depth=0.5", are drawn over the first
    that differs, with a line for each other one.

    Args:
        variants: figures of each, by metric and group.
        path: the picture; the folder is made.
        title: of the picture.
    """
    panels = {metric: _series(variants, metric) for metric in _metrics(variants)}
    panels = {metric: lines for metric, lines in panels.items() if lines}
    if panels:
        with _pictures(path, len(panels)) as all_axes:
            for axes, (metric, lines) in zip(all_axes, panels.items(), strict=True):
                _draw_series(axes, lines)
                axes.set_title(metric)
            all_axes[0].legend(frameon=False)
            all_axes[0].figure.suptitle(title)


def _metrics(variants: Mapping[str, Figures]) -> list[str]:
    return list(dict.fromkeys(metric for found in variants.values() for metric, _ in found))


def _series(variants: Mapping[str, Figures], metric: str) -> dict[str, list[tuple[float, Spread]]]:
    """Return the lines of a panel by their labels; none where no number differs between groups."""
    of_metric = {
        (name, group): one
        for name, found in variants.items()
        for (known, group), one in found.items()
        if known == metric and _NUMBERED.fullmatch(group)
    }
    keys: dict[str, set[str]] = {}
    for _, group in of_metric:
        for part in group.split():
            keys.setdefault(part.partition("=")[0], set()).add(part)
    along = next((key for key, parts in keys.items() if len(parts) > 1), None)
    lines: dict[str, list[tuple[float, Spread]]] = {}
    for (name, group), one in of_metric.items() if along else ():
        here = next((part for part in group.split() if part.startswith(f"{along}=")), None)
        if here is None:
            continue
        rest = [
            part for part in group.split() if part != here and len(keys[part.split("=")[0]]) > 1
        ]
        place = float(here.partition("=")[2].split("-")[0])
        lines.setdefault(" ".join([name, *rest]), []).append((place, one))
    return lines


def _draw_series(axes: "Axes", lines: Mapping[str, Sequence[tuple[float, Spread]]]) -> None:
    for number, (label, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point[0])
        places = [place for place, _ in ordered]
        means = [one.mean for _, one in ordered]
        below = [one.mean - one.lowest for _, one in ordered]
        above = [one.highest - one.mean for _, one in ordered]
        dashes = _DASHES[number // 10 % len(_DASHES)]
        axes.errorbar(
            places, means, yerr=(below, above), fmt=f"o{dashes}", color=f"C{number % 10}",
            markersize=4, linewidth=1.4, capsize=2, label=label,
        )  # fmt: skip
    axes.set_xscale("symlog", base=2)
    axes.grid(alpha=0.25)


@contextmanager
def _picture(path: Path, width: float = 9) -> Iterator["Axes"]:
    """Give axes to draw on, and save the picture at the end."""
    with _pictures(path, 1, width) as (axes,):
        yield axes


@contextmanager
def _pictures(path: Path, count: int, width: float = 9) -> Iterator[Sequence["Axes"]]:
    """Give axes below each other to draw on, and save the picture at the end."""
    # Takes about a second to import, which a job pays at its end only.
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 11}):
        height = _HEIGHT if count == 1 else _PANEL_HEIGHT * count
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # draws without a display
        yield [figure.add_subplot(count, 1, number + 1) for number in range(count)]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_losses(axes: "Axes", lines: Sequence[dict[str, float]]) -> None:
    tokens, values = _points(lines, "loss")
    axes.plot(tokens, values, color=_TRAIN, linewidth=0.8, alpha=0.3)
    means = smoothed_curve(values)
    label = f"train, smoothed {_last(means)}"
    axes.plot(tokens, means, color=_TRAIN, linewidth=2, label=label)
    tokens, values = _points(lines, "validation_loss")
    if values:
        label = f"validation {_last(values)}"
        axes.plot(tokens, values, "o-", color=_VALIDATION, markersize=5, linewidth=1, label=label)
    _, baseline = _points(lines, "unigram_loss")
    if baseline:
        label = f"unigram {baseline[-1]:.3f}"
        axes.axhline(baseline[-1], color=_BASELINE, linestyle="--", linewidth=1.2, label=label)
    for color, name in zip(_MTP * 4, _mtp_names(lines), strict=False):
        tokens, values = _points(lines, name)
        means = smoothed_curve(values)
        label = f"MTP depth {name.rpartition('_')[2]}, smoothed {_last(means)}"
        axes.plot(tokens, means, color=color, linewidth=0.9, label=label, zorder=1)


def _last(values: Sequence[float]) -> str:
    return f"{values[-1]:.3f}" if values else "-"


def _draw_gap(axes: "Axes", one: Comparison, name: str, number: int) -> None:
    shares = [100 * share for share in one.shares]
    low, mean, high = (
        [100 * getattr(point, part) for point in one.curve]
        for part in ("lowest", "mean", "highest")
    )
    color, dashes = f"C{number % 10}", _DASHES[number // 10 % len(_DASHES)]
    label = f"{name}  {100 * one.windows[TAIL].mean:+.2f} %"
    axes.fill_between(shares, low, high, color=color, alpha=0.12, linewidth=0)
    axes.plot(shares, mean, dashes, color=color, linewidth=1.6, label=label)


def _draw_seeds(axes: "Axes", one: Comparison, name: str) -> None:
    """Draw how far the seeds of the baseline deviate from each other."""
    shares = [100 * share for share in one.shares]
    above = [100 * value for value in one.seeds_curve]
    below = [-value for value in above]
    label = f"seeds of {name}" if any(map(math.isfinite, above)) else None
    axes.fill_between(shares, below, above, color=_BASELINE, alpha=0.15, linewidth=0, label=label)
    axes.axhline(0, color=_BASELINE, linewidth=1)


def _limits(comparisons: Iterable[Comparison]) -> tuple[float, float]:
    """Return where the picture ends below and above, in percent."""
    seen = [
        100 * value
        for one in comparisons
        for share, point in zip(one.shares, one.curve, strict=True)
        if share >= _SETTLED
        for value in (point.lowest, point.highest)
        if math.isfinite(value)
    ]
    low, high = min([0.0, *seen]), max([0.0, *seen])
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _decorate(axes: "Axes") -> None:
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)


def _points(lines: Sequence[dict[str, float]], name: str) -> Points:
    """Return tokens and values of the lines that have the metric."""
    having = [line for line in lines if name in line and "tokens" in line]
    return [line["tokens"] for line in having], [line[name] for line in having]


def _mtp_names(lines: Sequence[dict[str, float]]) -> list[str]:
    return sorted({name for line in lines for name in line if name.startswith("mtp_loss_")})
