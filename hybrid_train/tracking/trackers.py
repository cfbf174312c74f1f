"""Where metrics go: the interface of every destination, and the trackers of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hybrid_train.runtime import optional
from hybrid_train.schema.tracking import Tracking, WandbMode
from hybrid_train.tracking.goodput import note_dropped
from hybrid_train.tracking.jsonl import FILE_NAME, JsonLines


class Tracker(Protocol):
    """A destination of metrics. Made on rank 0 only; the other ranks have none."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take everything known about a step. Called once a step, with growing steps.

        Args:
            step: optimizer steps done.
            metrics: values under their names in `tracking/metrics.py`, without `step`.
        """
        ...

    def close(self) -> None:
        """Write what is pending. Nothing may be logged afterwards."""
        ...


class FanOut:
    """Several trackers as one. An empty one is what the ranks without output hold."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = tuple(trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def build_trackers(
    tracking: Tracking, run_dir: Path, resume_step: int, config: Mapping[str, Any]
) -> list[Tracker]:
    """Open metrics.jsonl and what else the section asks for. The console is made apart.

    Args:
        tracking: the section.
        run_dir: folder of the run; everything is written below it.
        resume_step: step of the checkpoint that the run goes on from; 0 for a fresh run.
        config: the whole config of the run as plain data, for W&B.

    Raises:
        UserError: if a library is asked for that is missing or broken, or W&B has no login.
    """
    wants_wandb = tracking.wandb.mode is not WandbMode.disabled
    if tracking.tensorboard:
        optional.require("tensorboard", "tracking.tensorboard=true")
    if wants_wandb:
        optional.require("wandb", f"tracking.wandb.mode={tracking.wandb.mode.value}")
    # What may still be refused comes first, metrics.jsonl last: a refused start changes no file.
    # The gateways import their libraries, which takes seconds; so only where they are wanted.
    trackers: list[Tracker] = []
    if wants_wandb:
        from hybrid_train.tracking.wandb import WeightsAndBiases

        trackers.append(WeightsAndBiases(tracking.wandb, run_dir, config))
    if tracking.tensorboard:
        from hybrid_train.tracking.tensorboard import TensorBoard

        trackers.append(TensorBoard(run_dir / "tensorboard", resume_step))
    lines = JsonLines(run_dir / FILE_NAME, resume_step)
    if lines.dropped:
        note_dropped(run_dir, resume_step, lines.dropped)
    return [lines, *trackers]
