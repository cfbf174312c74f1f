"""What a run says at its end, in words."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from hybrid_train.config.command_text import command, setting
from hybrid_train.schema.profile import FOLDER as PROFILE
from hybrid_train.schema.profile import TRACE_VIEWER
from hybrid_train.schema.units import counted, show_tokens
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.tracking.metrics import show, show_duration
from hybrid_train.tracking.smoothing import losses_of, smoothed_loss, window

_ENDING = ".json.gz"  # of a trace
_MOST_TRACES = 4

Lines = Sequence[dict[str, float]]


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
    over = window(len(losses))
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
    if baselines:
        gain = baselines[-1] - losses[-1]
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
    traces = sorted((run_dir / PROFILE).glob(f"*{_ENDING}"))
    lines += [f"  {'trace of steps':<16} {path}" for path in traces[-_MOST_TRACES:]]
    if traces:
        lines.append(f"  {'':<16} (open it at https://{TRACE_VIEWER}: Open trace file)")
    return lines


def _values(lines: Lines, name: str) -> list[float]:
    """Return the finite values of a metric, in order."""
    return [line[name] for line in lines if math.isfinite(line.get(name, math.nan))]
