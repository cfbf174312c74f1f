"""Tells the trackers what each step did."""

from hybrid_train.tracking.throughput import Throughput
from hybrid_train.tracking.tracker import Tracker
from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport


class LogMetrics(Hook):
    """One record a step, on the main process; comes after the hooks that add to the report."""

    def __init__(self, tracker: Tracker, throughput: Throughput, *, batch_grows: bool) -> None:
        self._tracker = tracker
        self._throughput = throughput
        self._batch_grows = batch_grows

    def step_end(self, run: Run, report: StepReport) -> None:
        tokens = report.sequences * run.engine.sequence_length
        speed = self._throughput.measure(tokens, report.seconds)
        size = {"global_batch": report.sequences} if self._batch_grows else {}
        record = {
            "tokens": run.state.tokens,
            "loss": report.loss,
            "lr": report.lr,
            **size,
            "grad_norm": report.grad_norm,
            **speed,
            **report.metrics,
        }
        self._tracker.log(run.state.step, record)

    def fit_end(self, run: Run) -> None:
        self._tracker.close()

    def fit_failed(self, run: Run) -> None:
        self._tracker.close()
