"""What a run does by itself when something goes wrong, and when it gives up."""

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.config.problems import Problem, at_least


@dataclass(kw_only=True)
class Recovery:
    """What a run does about bad steps, failed saves, slow processes and the clock."""

    skip_nonfinite: bool = True  # no update with a loss or gradient that is NaN or infinite
    spike_sigmas: float = 6.0  # no update with a loss so far above the mean of the window; 0: any
    spike_window: int = 128  # steps; before there are so many, no loss is a spike
    rollback_after: int = 3  # steps in a row without update; then the checkpoint before them
    max_rollbacks: int = 3  # in a row, each from an older checkpoint; then the run ends
    max_failed_saves: int = 3  # in a row, for a full disk or the like; then the run ends
    straggler_interval: int = 100  # steps between two comparisons of processes; 0: none
    straggler_ratio: float = 1.5  # times of a process over the median that are told
    time_limit_s: float | None = None  # save and stop so long after the start

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(0, spike_sigmas=self.spike_sigmas, max_rollbacks=self.max_rollbacks)
        yield from at_least(
            0, max_failed_saves=self.max_failed_saves, straggler_interval=self.straggler_interval
        )
        yield from at_least(1, rollback_after=self.rollback_after)
        yield from at_least(8, spike_window=self.spike_window)  # of fewer, sigma says nothing
        yield from at_least(1, straggler_ratio=self.straggler_ratio, time_limit_s=self.time_limit_s)
