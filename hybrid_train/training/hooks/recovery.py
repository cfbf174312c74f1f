"""Notes steps that were not taken, and goes back to a checkpoint where they come in a row."""

import logging
from collections.abc import Callable
from pathlib import Path

from hybrid_train.checkpoint import layout, store
from hybrid_train.config.command_text import setting, typed
from hybrid_train.runtime import ranks
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.recovery import Recovery
from hybrid_train.tracking import history
from hybrid_train.training.bad_steps import NoLabelsError
from hybrid_train.training.hook import Hook
from hybrid_train.training.hooks.checkpointing import content_of
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport

_log = logging.getLogger(__name__)


def ways_on(run_dir: Path) -> str:
    """Say how to go on after a step that was not taken and ended the run."""
    newest = layout.latest(run_dir)
    if newest is None:
        return (
            "There is no checkpoint to go on from: start in another folder with a lower learning "
            "rate or other data (run_dir=... schedule.peak_lr=... train.seed=...), and save "
            "earlier (checkpoint.interval=...)"
        )
    return (
        "Nothing was updated, so the checkpoints are as they were: go on in another folder, from "
        "the newest, or an older one if that fails alike, with a lower learning rate or other "
        f"data: run_dir=... {typed(setting('checkpoint.load', newest.path))} "
        "schedule.peak_lr=... train.seed=..."
    )


class Recover(Hook):
    """Comes after the metrics and before the save.

    A run that goes back takes weights and optimizer from the checkpoint, not the position: the
    batches that did the harm are not read again.
    """

    def __init__(self, settings: Recovery, run_dir: Path, settle: Callable[[], None]) -> None:
        """Take the settings.

        Args:
            settings: after how many bad steps.
            run_dir: the run folder.
            settle: completes a save that is being written.
        """
        self._settings = settings
        self._run_dir = run_dir
        self._settle = settle
        self._rollbacks = 0  # since the last time that as many steps in a row were good
        self._good = 0

    def step_end(self, run: Run, report: StepReport) -> None:
        if not report.skipped:
            self._good += 1
            if self._good >= self._settings.spike_window:
                self._rollbacks = 0
            return
        self._good = 0
        self._tell(run, report)
        if run.bad_steps.in_a_row >= self._settings.rollback_after:
            if report.skipped_kind == NoLabelsError.kind:
                raise self._given_up(run.state.step, report, "and no checkpoint has other data")
            self._roll_back(run, report)

    def _tell(self, run: Run, report: StepReport) -> None:
        sources = {name: count for name, count in report.source_tokens.items() if count}
        _log.warning(
            "step %d was skipped: %s%s",
            *(run.state.step, report.skipped, f"; sources {sources}" if sources else ""),
        )
        if ranks.is_main():
            end = run.state.tokens
            start = end - report.sequences * run.engine.sequence_length
            history.note(
                self._run_dir, "skipped", step=run.state.step, cause=report.skipped,
                first_token=start, last_token=end, source_tokens=sources,
            )  # fmt: skip

    def _roll_back(self, run: Run, report: StepReport) -> None:
        last = run.state.step
        first = last - run.bad_steps.in_a_row + 1
        self._settle()
        self._rollbacks += 1
        target = ranks.said_by_main(lambda: self._target(first))
        if target is None or self._rollbacks > self._settings.max_rollbacks:
            given_up = f"after {self._rollbacks - 1} rollbacks in a row"
            why = given_up if target else "and no checkpoint was saved before them"
            raise self._given_up(last, report, why)
        store.load(target, content_of(run.engine))
        run.bad_steps.in_a_row = 0
        _log.warning(
            "back to the weights of step %d; the batches of steps %d to %d are left out",
            *(target.step, first, last),
        )
        if ranks.is_main():
            history.note(self._run_dir, "rolled back", step=last, to=target.step, first=first)

    def _target(self, first: int) -> layout.Found | None:
        """Return the newest checkpoint before a step; an older one each time that did not help."""
        before = [found for found in layout.complete(self._run_dir) if found.step < first]
        return before[max(-self._rollbacks, -len(before))] if before else None

    def _given_up(self, step: int, report: StepReport, why: str) -> UserError:
        error = UserError(
            f"step {step}: {report.skipped}; {self._settings.rollback_after} steps in a row were "
            f"skipped, {why}. {ways_on(self._run_dir)}"
        )
        error.everywhere, error.kind = True, report.skipped_kind
        return error
