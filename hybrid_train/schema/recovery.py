"""What a run does by itself when something goes wrong, and when it gives up."""

from dataclasses import dataclass
from typing import Annotated

from hybrid_train.schema.limits import Count, CountOrNone, Factor, Range, SecondsOrMore

Window = Annotated[int, Range(8, 10**6)]  # of fewer, sigma says nothing
Ratio = Annotated[float, Range(1, 1000)]


@dataclass(kw_only=True)
class Recovery:
    """What a run does about bad steps, failed saves, slow processes and the clock."""

    skip_nonfinite: bool = True  # no update with a loss or gradient that is NaN or infinite
    spike_sigmas: Factor = 6.0  # no update with a loss so far above the mean of the window; 0: any
    spike_window: Window = 128  # steps; before there are so many, no loss is a spike
    rollback_after: Count = 3  # steps in a row without update; then the checkpoint before them
    max_rollbacks: CountOrNone = 3  # in a row, each from an older checkpoint; then the run ends
    max_failed_saves: CountOrNone = 3  # in a row, for a full disk or the like; then the run ends
    straggler_interval: CountOrNone = 100  # steps between two comparisons of processes; 0: none
    straggler_ratio: Ratio = 1.5  # times of a process over the median that are told
    time_limit_s: SecondsOrMore | None = None  # save and stop so long after the start
