"""The list of metrics: names, units, how each is shown; and the smoothed training loss.

Whoever logs takes the name from here; a name that is not in the list is refused.

The smoothed loss has one definition for console, summary, status, plots and report:

    smoothed(n) = mean of the losses of the last w(n) steps, step n included
    w(n) = n / 10, rounded down, but from 1 to 100 steps

It looks back only, so that a run knows it while it trains and no later step changes it. Towards the
start, where losses fall fast, the window is short. Losses that are not finite are left out. Windows
of tokens, by which a study compares runs, are another thing: `tracking/gaps.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from hybrid_train.schema.units import show_tokens

_NATS = "nats per token"
LONGEST_WINDOW = 100  # steps that the smoothed loss is a mean of
_WINDOW_SHARE = 10  # the window is so many times shorter than the run so far


@dataclass(frozen=True)
class Metric:
    """One metric. A name with a number or a source at its end belongs to a family: `loss/{}`."""

    name: str
    unit: str
    meaning: str
    show: Callable[[float], str]
    label: str = ""  # short name on the console; empty: the name


def show_duration(seconds: float) -> str:
    """Write a time the short way: 45 s -> "45s", 130 s -> "2m10s", 3900 s -> "1h05m"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def show_step_time(seconds: float) -> str:
    """Write the time of one step: 0.0123 s -> "12ms", 1.234 s -> "1.23s"."""
    if seconds < 1:
        return f"{1000 * seconds:.0f}ms"
    return f"{seconds:.2f}s" if seconds < 10 else f"{seconds:.1f}s"  # noqa: PLR2004 - digits only


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


# By group, as TensorBoard and Weights & Biases show them.
GROUPS: dict[str, tuple[Metric, ...]] = {
    "progress": (
        Metric("step", "", "optimizer steps done", _whole),
        Metric("tokens", "tokens", "tokens seen by all ranks since the start", show_tokens),
        Metric("global_batch", "sequences", "size of a batch that grows", _whole, "batch"),
        Metric("tokens/{}", "tokens", "labels seen of a source, since the start", show_tokens),
        Metric("epochs/{}", "", "those over the tokens that the source has", "{:.3f}".format),
    ),
    "loss": (
        Metric("loss", _NATS, "cross-entropy of the next token on the batch", _loss),
        # Never logged: whoever shows it takes it from the losses.
        Metric("smoothed_loss", _NATS, "mean over the last steps", _loss, "avg loss"),
        Metric("mtp_loss_{}", _NATS, "cross-entropy at an MTP depth, from 1", _loss),
        Metric("divergence", _NATS, "of a student from its teachers", _loss),
        Metric("cross_entropy", _NATS, "of the next token, of a student", _loss),
        Metric("hidden_loss", "", "of hidden states of a student from its teacher's", _loss),
        Metric("validation_hidden_loss", "", "the same on the validation part", _loss),
        Metric("validation_divergence", _NATS, "the same on the validation part", _loss),
        Metric("validation_cross_entropy", _NATS, "the same on the validation part", _loss),
        Metric(
            "validation_agreement",
            "",
            "share of tokens for which student and first teacher hold the same to be likeliest",
            "{:.2%}".format,
        ),
        Metric("loss/{}", _NATS, "cross-entropy on the rows of a source", _loss),
        Metric("term/{}", "", "a term of an objective", _loss),
        Metric("validation_term/{}", "", "the same on the validation part", _loss),
        Metric("validation_loss/{}", _NATS, "cross-entropy on a source's validation part", _loss),
        Metric("validation_loss", _NATS, "cross-entropy on the validation part", _loss, "val"),
        Metric(
            "start_validation_loss",
            _NATS,
            "cross-entropy on the validation part before the first step",
            _loss,
        ),
        Metric("validation_mtp_loss_{}", _NATS, "the same at an MTP depth, from 1", _loss),
        Metric(
            "unigram_loss",
            _NATS,
            "cross-entropy of the train unigram distribution on the validation part",
            _loss,
            "unigram",
        ),
    ),
    "evaluation": (Metric("evaluation/{}", "", "of a task, by its name", "{:.4g}".format),),
    "optimizer": (
        Metric("lr", "", "learning rate of the step", "{:.2e}".format),
        Metric("grad_norm", "", "norm of the gradient before clipping", "{:.3f}".format),
        Metric("skipped", "", "1 where the update was not made; history.jsonl says why", _whole),
    ),
    "routing": (
        Metric("moe_aux_loss", "", "load-balance loss, before its weight", "{:.4f}".format),
        Metric(
            "expert_load_{}",
            "",
            "tokens of the busiest expert over the mean, by layer number from 1",
            "{:.2f}".format,
        ),
        Metric(
            "expert_load_mtp_{}",
            "",
            "the same for the MoE layers of an MTP block, numbered from 1 within it",
            "{:.2f}".format,
        ),
    ),
    "precision": (
        Metric("underflow/{}", "", "nonzero values of an operand rounded to 0", "{:.2%}".format),
        Metric("saturation/{}", "", "values of an operand cut at the largest", "{:.2%}".format),
        Metric("rounding_error/{}", "", "of an operand, relative, squared mean", "{:.3f}".format),
    ),
    "speed": (
        Metric("tokens_per_s", "tokens/s", "speed of all ranks", show_tokens, "tok/s"),
        Metric("step_time_s", "s", "wall time of the step", show_step_time, "time"),
        Metric("pause_s", "s", "before the step, that no step took", show_step_time),
        Metric("save_time_s", "s", "part of that, in which a save was waited for", show_step_time),
        Metric("validation_time_s", "s", "the same, for validation", show_step_time),
        Metric(
            "mfu",
            "",
            "share of the peak that the FLOPs of model and teachers reach",
            "{:.1%}".format,
            "MFU",
        ),
    ),
    "hooks": (Metric("own/{}", "", "of a hook of one's own", "{:.4g}".format),),
}


METRICS = {metric.name: metric for group in GROUPS.values() for metric in group}
_GROUP_OF = {metric.name: name for name, group in GROUPS.items() for metric in group}


def mtp_loss(depth: int) -> str:
    """Name the loss of an MTP depth; the first depth is 1."""
    return f"mtp_loss_{depth}"


def expert_load(layer: int, *, in_mtp: bool = False) -> str:
    """Name the load of a MoE layer; the first layer of the model is 1, of whatever kind."""
    return f"expert_load_{'mtp_' if in_mtp else ''}{layer}"


def metric(name: str) -> Metric:
    """Look up a metric by name, members of families included.

    Where a step trains several networks, "lr/NETWORK" is the rate of one of them, and so on.

    Raises:
        ValueError: if it is not in the list.
    """
    family, slash, _ = name.partition("/")  # of a source, whose name may have any characters
    found = METRICS.get(f"{family}/{{}}") if slash else None
    if found is None:
        stem, _, number = family.rpartition("_")
        found = METRICS.get(f"{stem}_{{}}" if number.isdecimal() else family)
    if found is None:
        raise ValueError(f"{name!r} is no metric; add it to hybrid_train/tracking/metrics.py")
    return found


def show(name: str, value: float) -> str:
    """Write a value as the user sees it."""
    return metric(name).show(value)


def tag(name: str) -> str:
    """Return the name under which TensorBoard and W&B show a metric: `optimizer/grad_norm`."""
    return f"{_GROUP_OF[metric(name).name]}/{name}"


def smoothing_window(steps: int, longest: int = LONGEST_WINDOW) -> int:
    """Return over how many steps the loss after `steps` steps is averaged."""
    return min(longest, max(1, steps // _WINDOW_SHARE))


def smoothed_loss(losses: Sequence[float]) -> float:
    """Return the smoothed loss of the last step of a run; NaN if there is none.

    Args:
        losses: of all steps so far, nats per token.
    """
    finite = [loss for loss in losses[-smoothing_window(len(losses)) :] if math.isfinite(loss)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def smoothed_curve(values: Sequence[float], longest: int = LONGEST_WINDOW) -> list[float]:
    """Return the smoothed value of each step; NaN where there is no finite one.

    Args:
        values: of all steps.
        longest: of the windows, in steps; that of the smoothed loss, if it is left out.
    """
    # Sums from the start: of a hundred thousand values the windows themselves would take minutes.
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(v if f else 0.0 for v, f in zip(values, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    means = []
    for last in range(1, len(values) + 1):
        over = last // _WINDOW_SHARE or 1
        first = last - (over if over < longest else longest)
        number = counts[last] - counts[first]
        means.append((sums[last] - sums[first]) / number if number else math.nan)
    return means


def losses_of(lines: Sequence[Mapping[str, float]]) -> list[float]:
    """Return the training loss of each step from the lines of a metrics.jsonl."""
    return [line["loss"] for line in lines if "loss" in line]
