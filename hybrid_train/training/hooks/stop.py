"""Stops the run between two steps when any of its processes got a signal, or time is up."""

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hybrid_train.runtime.signals import SIGNALS, StopSignals
from hybrid_train.tracking import history
from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport

if TYPE_CHECKING:
    import signal


class StopOnSignal(Hook):
    """All processes agree on the signal, so that all save the same step."""

    def __init__(self, time_limit_s: float | None = None) -> None:
        """Listen from now on.

        Args:
            time_limit_s: how long from now; None: for ever. The clock of rank 0 counts.
        """
        self.signal: signal.Signals | None = None
        self._rank = 0  # the last of those that got it
        self._end = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._limit_s, self._time_is_up = time_limit_s, False
        self._signals = StopSignals()

    def fit_start(self, run: Run) -> None:
        self._agree(run)

    def step_end(self, run: Run, report: StepReport) -> None:
        self._agree(run)

    def _agree(self, run: Run) -> None:
        received, rank, ranks = self._signals.received, dist.get_rank(), dist.get_world_size()
        mine = -1 if received is None else SIGNALS.index(received) * ranks + rank
        late = rank == 0 and self._end is not None and time.monotonic() > self._end
        told = torch.tensor([mine, late], device=run.engine.network.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        theirs, time_is_up = told.tolist()
        if time_is_up:
            self._time_is_up = run.stop_requested = True
        if theirs >= 0:
            self.signal, self._rank = SIGNALS[theirs // ranks], theirs % ranks
            run.stop_requested = True

    def how_it_ended(self) -> tuple[str, str, str, tuple[int, ...]]:
        """Return outcome, kind, cause and ranks for the history of the run."""
        if self.signal is None and self._time_is_up:
            text = f"stopped after a save: recovery.time_limit_s={self._limit_s:g} is over"
            return history.STOPPED, "clock", text, ()
        if self.signal is None:
            return history.FINISHED, "finished", "all tokens are trained", ()
        text = f"stopped by {self.signal.name} on rank {self._rank} after a save"
        return history.STOPPED, "signal", text, (self._rank,)

    def close(self) -> None:
        """Let signals do what they did before; earlier, they would end a process without a word."""
        self._signals.restore()
