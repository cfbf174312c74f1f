"""Pictures: the loss curve of a run, and the gaps of several runs to a baseline."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_train.schema.units import show_tokens
from hybrid_train.tracking.gaps import TAIL, Comparison
from hybrid_train.tracking.jsonl import read_metrics
from hybrid_train.tracking.metrics import smoothed_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _VALIDATION, _BASELINE = "#2f6fb5", "#d1495b", "#777777"
_MTP = ("#8fb339", "#e09f3e", "#7b5ea7", "#4fb0ae")
_SETTLED = 0.2  # share of training; gaps of losses that still fall fast do not set the scale
_DASHES = ("-", "--", ":")  # for ten curves each, as there are ten colours

Points = tuple[list[float], list[float]]  # tokens, values


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


@contextmanager
def _picture(path: Path, width: float = 9) -> Iterator["Axes"]:
    """Give axes to draw on, and save the picture at the end."""
    # Takes about a second to import, which a job pays at its end only.
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 11}):
        figure = Figure(figsize=(width, 5.2), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # draws without a display
        yield figure.add_subplot()
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
