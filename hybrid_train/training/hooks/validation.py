"""Measures the validation loss at an interval and at the end of the run."""

from collections.abc import Callable

from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport


class Validate(Hook):
    """Adds the losses on held-out text to the report of the step."""

    def __init__(self, interval: int, baseline: Callable[[], float | None]) -> None:
        self._interval = interval
        self._baseline = baseline  # loss of the unigram distribution; known to the main process

    def step_end(self, run: Run, report: StepReport) -> None:
        due = self._interval and run.state.step % self._interval == 0
        if run.validation is None or not (due or run.is_complete):
            return
        for name, value in run.engine.evaluate(run.validation).items():
            report.metrics[f"validation_{name}"] = value
        baseline = self._baseline()
        if baseline is not None:
            report.metrics["unigram_loss"] = baseline
