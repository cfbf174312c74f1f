"""Where metrics go: the interface of every destination, and the fan-out to several."""

from collections.abc import Mapping, Sequence
from typing import Protocol


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
