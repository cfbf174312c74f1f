"""Stops the run between two steps when any of its processes got a signal."""

import signal

import torch
import torch.distributed as dist

from hybrid_train.runtime.signals import StopSignals
from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport


class StopOnSignal(Hook):
    """All processes agree on the signal, so that all save the same step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._signals = StopSignals()

    def step_end(self, run: Run, report: StepReport) -> None:
        number = torch.tensor(self._signals.received or 0, device=run.engine.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number.item():
            self.signal = signal.Signals(int(number.item()))
            run.stop_requested = True

    def fit_end(self, run: Run) -> None:
        self._signals.restore()

    def fit_failed(self, run: Run) -> None:
        self._signals.restore()
