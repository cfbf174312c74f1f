"""Stops the run between two steps when any of its processes got a signal."""

import signal

import torch
import torch.distributed as dist

from hybrid_train.runtime.signals import StopSignals
from hybrid_train.tracking import history
from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport


class StopOnSignal(Hook):
    """All processes agree on the signal, so that all save the same step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._rank = 0  # the last of those that got it
        self._signals = StopSignals()

    def fit_start(self, run: Run) -> None:
        self._agree(run)

    def step_end(self, run: Run, report: StepReport) -> None:
        self._agree(run)

    def _agree(self, run: Run) -> None:
        mine = self._signals.received or 0
        told = torch.tensor([mine, dist.get_rank() + 1 if mine else 0], device=run.engine.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        number, rank = told.tolist()
        if number:
            self.signal, self._rank = signal.Signals(number), rank - 1
            run.stop_requested = True

    def how_it_ended(self) -> tuple[str, str, str, tuple[int, ...]]:
        """Return outcome, kind, cause and ranks for the history of the run."""
        if self.signal is None:
            return history.FINISHED, "finished", "all tokens are trained", ()
        text = f"{self.signal.name} on rank {self._rank}; saved and stopped"
        return history.STOPPED, "signal", text, (self._rank,)

    def fit_end(self, run: Run) -> None:
        self._signals.restore()

    def fit_failed(self, run: Run) -> None:
        self._signals.restore()
