"""Tells the trackers what each step did."""

from collections.abc import Mapping

from hybrid_train.tracking.throughput import Throughput
from hybrid_train.tracking.tracker import Tracker
from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport


class LogMetrics(Hook):
    """One record a step, on the main process; comes after the hooks that add to the report."""

    def __init__(
        self,
        tracker: Tracker,
        throughput: Throughput,
        *,
        batch_changes: bool,
        source_sizes: Mapping[str, int],
    ) -> None:
        """Take the settings.

        Args:
            tracker: what is told.
            throughput: measures speed.
            batch_changes: whether steps have several sizes.
            source_sizes: tokens of each source, for the epochs of those that are told apart.
        """
        self._tracker = tracker
        self._throughput = throughput
        self._batch_changes = batch_changes
        self._sizes = source_sizes

    def step_end(self, run: Run, report: StepReport) -> None:
        tokens = report.sequences * run.engine.sequence_length
        speed = self._throughput.measure(tokens, report.seconds, run.flops_per_token)
        size = {"global_batch": report.sequences} if self._batch_changes else {}
        seen = run.state.source_tokens
        record = {
            "tokens": run.state.tokens,
            "loss": report.loss,
            "lr": report.lr,
            **size,
            "grad_norm": report.grad_norm,
            **speed,
            **report.metrics,
            **{f"tokens/{source}": count for source, count in seen.items()},
            **{f"epochs/{source}": count / self._sizes[source] for source, count in seen.items()},
        }
        self._tracker.log(run.state.step, record)

    def fit_end(self, run: Run) -> None:
        self._tracker.close()

    def fit_failed(self, run: Run) -> None:
        self._tracker.close()
