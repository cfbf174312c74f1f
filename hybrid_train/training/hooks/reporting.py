"""Hooks that tell the trackers what each step did, measure validation losses, and ask tasks."""

import time
from collections.abc import Callable, Mapping

from hybrid_train.runtime import heartbeat
from hybrid_train.tracking.throughput import Throughput
from hybrid_train.tracking.trackers import Tracker
from hybrid_train.training.engine import StepReport
from hybrid_train.training.loop import Hook, Run

_PAUSES = {heartbeat.SAVE: "save_time_s", heartbeat.VALIDATION: "validation_time_s"}


class LogMetrics(Hook):
    """Tells the trackers one record a step, on the main process.

    It comes after the hooks that add to the report.
    """

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
        self._logged = 0.0
        self._before: Mapping[str, float] = {}

    def fit_start(self, run: Run) -> None:
        self._logged, self._before = time.perf_counter(), heartbeat.all_seconds()

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
            **self._pauses(report),
            **report.metrics,
            **{f"tokens/{source}": count for source, count in seen.items()},
            **{f"epochs/{source}": count / self._sizes[source] for source, count in seen.items()},
        }
        self._tracker.log(run.state.step, record)

    def _pauses(self, report: StepReport) -> dict[str, float]:
        """Return the time since the last record that the step did not take, and what did.

        The save of the step before is in it, and the validation of this one.
        """
        start, self._logged = self._logged, time.perf_counter()
        before, self._before = self._before, heartbeat.all_seconds()
        found = {"pause_s": max(0.0, self._logged - start - report.seconds)}
        for part, name in _PAUSES.items():
            seconds = self._before.get(part, 0.0) - before.get(part, 0.0)
            if seconds > 0:
                found[name] = seconds
        return found

    def fit_end(self, run: Run) -> None:
        self._tracker.close()

    def fit_failed(self, run: Run) -> None:
        self._tracker.close()


class Validate(Hook):
    """Measures losses on held-out text at an interval and at the end; the report gets them."""

    def __init__(
        self, interval: int, baseline: Callable[[], float | None], *, at_start: bool = False
    ) -> None:
        """Take the settings.

        Args:
            interval: in steps; 0: at the end alone.
            baseline: returns the loss of the unigram distribution; known to the main process.
            at_start: measure ahead of the next step, too; the report of that gets it.
        """
        self._interval, self._baseline, self._at_start = interval, baseline, at_start
        self._of_start: dict[str, float] = {}

    def fit_start(self, run: Run) -> None:
        if self._at_start and run.validation is not None:
            found = run.engine.evaluate(run.validation)
            loss = found.get("cross_entropy", found["loss"])  # of a student, whose loss is another
            self._of_start = {"start_validation_loss": loss}

    def step_end(self, run: Run, report: StepReport) -> None:
        report.metrics.update(self._of_start)
        self._of_start = {}
        due = self._interval and run.state.step % self._interval == 0
        if run.validation is None or not (due or run.is_complete):
            return
        for name, value in run.engine.evaluate(run.validation).items():
            report.metrics[f"validation_{name}"] = value
        baseline = self._baseline()
        if baseline is not None:
            report.metrics["unigram_loss"] = baseline


class AskTasks(Hook):
    """Asks the model the tasks of evaluation at an interval and at the end; the report gets them.

    It takes the time of validation.
    """

    def __init__(self, interval: int, ask: Callable[[Run], Mapping[str, float]]) -> None:
        """Take the settings.

        Args:
            interval: in steps.
            ask: asks the model of a run, which trains on as if it had not been asked; returns
                metrics by their names.
        """
        self._interval, self._ask = interval, ask

    def step_end(self, run: Run, report: StepReport) -> None:
        if run.state.step % self._interval and not run.is_complete:
            return
        heartbeat.enter(heartbeat.VALIDATION)
        report.metrics.update(self._ask(run))
        heartbeat.enter(heartbeat.BETWEEN)
