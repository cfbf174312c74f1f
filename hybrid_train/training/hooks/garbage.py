"""Collects garbage at the same steps on all processes, so that none makes the others wait."""

import gc

from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport


class CollectGarbage(Hook):
    """Takes over from Python's own timing while the run lasts."""

    def __init__(self, interval: int = 100) -> None:
        self._interval = interval

    def fit_start(self, run: Run) -> None:
        gc.collect()
        gc.freeze()  # what was built so far stays until the end
        gc.disable()

    def step_end(self, run: Run, report: StepReport) -> None:
        if run.state.step % self._interval == 0:
            gc.collect()

    def fit_end(self, run: Run) -> None:
        gc.unfreeze()
        gc.enable()
