"""What the user sees: a bar or a line per interval while a run goes on, a summary at its end."""

import math
import statistics
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from hybrid_train.config.commands import command, setting
from hybrid_train.schema.tracking import PROFILE_FOLDER, TRACE_VIEWER
from hybrid_train.schema.units import counted, show_tokens
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.tracking.metrics import (
    losses_of,
    metric,
    show,
    show_duration,
    smoothed_loss,
    smoothing_window,
)

_TRACE_ENDING = ".json.gz"  # of a trace
_MOST_TRACES = 4

Lines = Sequence[dict[str, float]]
_RECENT_STEPS = 30  # the rate behind the time left is that of these
# Names and widths of the columns of a plain line; what is missing leaves its column out.
_LINE_COLUMNS = {
    "loss": 7,
    "smoothed_loss": 7,
    "lr": 8,
    "global_batch": 5,
    "grad_norm": 6,
    "tokens_per_s": 6,
    "step_time_s": 6,
    "mfu": 6,
}
_BAR_FIGURES = ("smoothed_loss", "tokens_per_s", "step_time_s", "mfu")
_VALIDATION = ("validation_loss", "unigram_loss")


class Console:
    """Shows progress; a tracker as the others are, that can also say a sentence.

    On a terminal a bar moves with every step, and lines appear above it at validation. Elsewhere
    there is a line at the first step, every `interval` steps, at validation and at the last step.
    """

    def __init__(
        self,
        total_tokens: int,
        start_tokens: int = 0,
        interval: int = 10,
        losses: Sequence[float] = (),
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start to show.

        Args:
            total_tokens: tokens of the whole run.
            start_tokens: tokens seen before this process; not 0 where a run resumes.
            interval: steps between plain lines.
            losses: of the steps before this process, for the smoothed one.
            terminal: whether there is one; None: look at the standard output.
            clock: seconds, for the time left.
        """
        self._total = total_tokens
        self._interval = interval
        self._clock = clock
        self._losses = array("d", losses)
        self._recent = deque([(clock(), start_tokens)], maxlen=_RECENT_STEPS + 1)
        self._pending: str | None = None  # line of the last step, if it was not printed
        self._started = False
        self._bar: Progress | None = None
        if sys.stdout.isatty() if terminal is None else terminal:
            self._bar = _bar()
            self._task = self._bar.add_task("", total=total_tokens, completed=start_tokens, text="")
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step. `tokens` must be among the metrics."""
        tokens = int(metrics["tokens"])
        metrics = self._with_smoothed_loss(metrics)
        self._recent.append((self._clock(), tokens))
        left = f"left {show_duration(self.seconds_left())}"
        line = _line(step, self._total, metrics, left)
        validated = any(name in metrics for name in _VALIDATION)
        if self._bar is not None:
            figures = [f"step {step}"]
            figures += [_figure(name, metrics[name]) for name in _BAR_FIGURES if name in metrics]
            self._bar.update(self._task, completed=tokens, text="  ".join([*figures, left]))
            if validated:
                self.say(line)
            return
        self._pending = line
        is_last = tokens >= self._total
        if not self._started or validated or is_last or step % self._interval == 0:
            self.say(line)
            self._pending = None
        self._started = True

    def _with_smoothed_loss(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        if "loss" not in metrics:
            return metrics
        self._losses.append(metrics["loss"])
        return {**metrics, "smoothed_loss": smoothed_loss(self._losses)}

    def say(self, text: str) -> None:
        """Print a message; above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def seconds_left(self) -> float:
        """Estimate the time to finish from the last steps, pauses for validation included."""
        (first_time, first_tokens), (last_time, last_tokens) = self._recent[0], self._recent[-1]
        seen = last_tokens - first_tokens
        missing = max(0, self._total - last_tokens)
        if missing == 0:
            return 0.0
        return missing * (last_time - first_time) / seen if seen > 0 else float("inf")

    def close(self) -> None:
        """End the bar; print the last step, if it is still missing."""
        if self._bar is not None:
            self._bar.stop()
        if self._pending is not None:
            self.say(self._pending)
            self._pending = None


def _bar() -> Progress:
    text = TextColumn(
        "{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
    )
    percentage = TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True))
    # Written to the real terminal, at most four times a second: the run comes first.
    return Progress(
        percentage,
        BarColumn(bar_width=None),
        text,
        console=RichConsole(force_terminal=True),
        expand=True,
        refresh_per_second=4,
    )


def _figure(name: str, value: float, width: int = 0) -> str:
    """Write one value with its label, padded on the left: "loss  4.3210"."""
    return f"{metric(name).label or name} {show(name, value):>{width}}"


def _line(step: int, total_tokens: int, metrics: Mapping[str, float], left: str) -> str:
    """Write a step as one line of columns: step, tokens, figures, time left, validation."""
    tokens = f"{show('tokens', metrics['tokens'])}/{show_tokens(total_tokens)}"
    columns = [f"step {step:>6}", f"tokens {tokens:>11}"]
    columns += [
        _figure(name, metrics[name], w) for name, w in _LINE_COLUMNS.items() if name in metrics
    ]
    columns.append(f"{left:<11}")
    columns += [_figure(name, metrics[name]) for name in _VALIDATION if name in metrics]
    return "  ".join(columns).rstrip()


def summarise(run_dir: Path, peak: str = "", commands: Sequence[str] = ()) -> str:
    """Tell what the run did, how good and how fast it was, where things lie, what to do next.

    Args:
        run_dir: the run folder; all figures come from its metrics.jsonl.
        peak: where the peak behind MFU comes from.
        commands: commands that go on from here, such as the one that trains for longer.

    Returns:
        Several lines of text, without a line break at the end.
    """
    lines = read_metrics(run_dir / FILE_NAME)
    if not lines:
        return f"No step was done. The run folder is {run_dir}."
    parts = [_length(lines), *_losses(lines), *_validation(lines), *_speed(lines, peak)]
    parts += ["", "Where things lie:", *_places(run_dir)]
    generate = command("generate", setting("checkpoint", run_dir), "prompt=import")
    parts += ["", "Next:", *(f"  {one}" for one in (generate, *commands))]
    return "\n".join(parts)


def _length(lines: Lines) -> str:
    seconds = sum(_values(lines, "step_time_s"))
    steps, tokens = counted(int(lines[-1]["step"]), "step"), show("tokens", lines[-1]["tokens"])
    return f"Trained {steps}, {tokens} tokens, in {show_duration(seconds)} of steps."


def _losses(lines: Lines) -> list[str]:
    losses = losses_of(lines)
    if not losses:
        return []
    over = smoothing_window(len(losses))
    steps = f"{over} steps" if over > 1 else "step"
    return [
        f"Train loss went from {losses[0]:.3f} at the first step to {smoothed_loss(losses):.3f} "
        f"nats per token, mean of the last {steps}."
    ]


def _validation(lines: Lines) -> list[str]:
    losses, baselines = _values(lines, "validation_loss"), _values(lines, "unigram_loss")
    if not losses:
        return []
    text = [f"Validation loss is {losses[-1]:.3f} nats per token."]
    of_labels = _values(lines, "validation_cross_entropy")  # of a student, whose loss is another
    if of_labels:
        agreement = _values(lines, "validation_agreement")
        text.append(
            f"It is the divergence from the teacher; the cross-entropy is {of_labels[-1]:.3f}, and "
            f"for {agreement[-1]:.1%} of the tokens both hold the same one to be the likeliest."
        )
    if baselines:
        gain = baselines[-1] - (of_labels or losses)[-1]
        text.append(
            f"The unigram distribution of the train part has a cross-entropy of "
            f"{baselines[-1]:.3f} there: the model is {abs(gain):.3f} nats per token "
            f"{'below' if gain >= 0 else 'ABOVE'} it."
        )
    return text


def _speed(lines: Lines, peak: str) -> list[str]:
    times = _values(lines, "step_time_s")
    if not times:
        return []
    # Medians: the first step warms up, and a pause for something else is no property of the run.
    speed = statistics.median(_values(lines, "tokens_per_s"))
    text = f"Speed: {show_tokens(speed)} tokens/s, {show('step_time_s', statistics.median(times))}"
    text += " a step (medians)"
    shares = _values(lines, "mfu")
    if shares:
        text += f"; MFU {show('mfu', statistics.median(shares))}"
        text += f" of {peak}" if peak else ""
    return [f"{text}."]


def _places(run_dir: Path) -> list[str]:
    """List what is there, one line each."""
    places = {
        "checkpoints": "checkpoints",
        FILE_NAME: "metrics",
        "plots/loss.png": "plot",
        "tensorboard": "TensorBoard",
        "wandb": "Weights & Biases",
        "config.yaml": "config",
    }
    there = {place: name for place, name in places.items() if (run_dir / place).exists()}
    lines = [f"  {name:<16} {run_dir / place}" for place, name in there.items()]
    traces = sorted((run_dir / PROFILE_FOLDER).glob(f"*{_TRACE_ENDING}"))
    lines += [f"  {'trace of steps':<16} {path}" for path in traces[-_MOST_TRACES:]]
    if traces:
        lines.append(f"  {'':<16} (open it at https://{TRACE_VIEWER}: Open trace file)")
    return lines


def _values(lines: Lines, name: str) -> list[float]:
    """Return the finite values of a metric, in order."""
    return [line[name] for line in lines if math.isfinite(line.get(name, math.nan))]
