"""Checkpoints and recovery: when to save, what to start from, what to do when something fails."""

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from hybrid_train.schema.limits import Count, CountOrNone, Factor, FileName, Range, SecondsOrMore
from hybrid_train.schema.problems import Problem

SpikeWindow = Annotated[int, Range(8, 10**6)]  # of fewer, sigma says nothing
URL = re.compile(r"[a-z][a-z0-9+.-]*://.*[^/\s].*", re.IGNORECASE)
URL_RULE = "must be the URL of a folder, such as s3://BUCKET/runs/a"
StragglerRatio = Annotated[float, Range(1, 1000)]


class LoadOnly(enum.Enum):
    """Part of a checkpoint that is loaded."""

    weights = "weights"


@dataclass(kw_only=True)
class Checkpoint:
    """When to save, what to keep, what to start from. A run resumes its own latest by itself."""

    interval: CountOrNone = 500  # steps between saves; 0: only at the end
    keep: Count = 2  # newest checkpoints that stay
    async_save: bool = True  # train on while it is written, from a copy in host memory
    load: FileName | None = None  # a run folder, a checkpoint, or the URL of one; with its model
    load_only: LoadOnly | None = None  # None: weights, optimizer and position
    url: FileName | None = None  # whole checkpoints are copied there, and fetched if newer there
    url_patience_s: SecondsOrMore = 600  # a network that is gone for longer ends the try to copy

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if self.url is not None and not URL.fullmatch(self.url):
            yield Problem("url", self.url, URL_RULE)


@dataclass(kw_only=True)
class Recovery:
    """What a run does about bad steps, failed saves, slow processes and the clock."""

    skip_nonfinite: bool = True  # no update with a loss or gradient that is NaN or infinite
    spike_sigmas: Factor = 6.0  # no update with a loss so far above the mean of the window; 0: any
    spike_window: SpikeWindow = 128  # steps; before there are so many, no loss is a spike
    rollback_after: Count = 3  # steps in a row without update; then the checkpoint before them
    max_rollbacks: CountOrNone = 3  # in a row, each from an older checkpoint; then the run ends
    max_failed_saves: CountOrNone = 3  # in a row, for a full disk or the like; then the run ends
    straggler_interval: CountOrNone = 100  # steps between two comparisons of processes; 0: none
    straggler_ratio: StragglerRatio = 1.5  # times of a process over the median that are told
    checksum_interval: CountOrNone = 0  # steps between two comparisons of equal weights; 0: none
    time_limit_s: SecondsOrMore | None = None  # save and stop so long after the start
