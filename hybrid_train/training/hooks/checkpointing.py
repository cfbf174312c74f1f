"""Hooks that save a run, copy that elsewhere, go back where steps fail, enter the next phase."""

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hybrid_train.checkpoint import layout, store
from hybrid_train.checkpoint.copier import Copier
from hybrid_train.checkpoint.save_load import read_weights
from hybrid_train.checkpoint.shards import Content, HeldNetwork
from hybrid_train.checkpoint.writing import KeptSavePlan
from hybrid_train.config.commands import setting, typed
from hybrid_train.megatron import data_parallel
from hybrid_train.planning.phases import PhaseSpan, phase_at
from hybrid_train.runtime import heartbeat, ranks
from hybrid_train.schema.checkpoint import Checkpoint, Recovery
from hybrid_train.schema.problems import DISK, UserError
from hybrid_train.schema.units import counted
from hybrid_train.tracking import history
from hybrid_train.training.bad_steps import NoLabelsError
from hybrid_train.training.engine import Engine, StepReport
from hybrid_train.training.loop import Hook, Run

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _InFlight:
    """A save that is being written."""

    saving: store.Saving
    start: float
    waited_s: float  # time that training waited for it


class SaveCheckpoints(Hook):
    """Saves at an interval, at the end and on a stop; the newest `keep` checkpoints stay.

    With `async_save` training goes on while it is written, from a copy in host memory. A thread
    gives it its name when a step finds it written by all processes; the next save waits for that.
    """

    def __init__(
        self,
        settings: Checkpoint,
        run_dir: Path,
        saved_step: int,
        max_failed: int = 0,
        copier: Copier | None = None,
    ) -> None:
        """Take the settings.

        Args:
            settings: how often, how many.
            run_dir: the run folder.
            saved_step: of the newest checkpoint of this run.
            max_failed: saves in a row that may fail for the disk while the run goes on.
            copier: what copies checkpoints behind a URL, on the main process.
        """
        self._settings = settings
        self._max_failed, self._failed = max_failed, 0
        self._run_dir = run_dir
        self._saved_step = saved_step
        self._copier = copier
        self.saves = 0  # that are whole
        self._in_flight: _InFlight | None = None
        self._plan = KeptSavePlan()

    def step_end(self, run: Run, report: StepReport) -> None:
        interval = self._settings.interval
        try:
            if self._in_flight is not None and self._is_done(self._in_flight):
                self._finish()
            if interval and run.state.step % interval == 0:
                self._save(run, copy=self._settings.async_save)
        except UserError as error:
            self._failed += 1
            if error.kind != DISK or self._failed > self._max_failed:
                raise
            self._saved_step = -1  # whatever was in flight: the next save is not left out
            again = counted(interval, "step")
            _log.warning("the run goes on, and saves again in %s: %s", again, error)
            if ranks.is_main():
                self._note(run.state.step, str(error))

    def _note(self, step: int, cause: str) -> None:
        with contextlib.suppress(OSError):  # the disk of the history is that of the checkpoints
            history.note(self._run_dir, "save failed", step=step, cause=cause)

    def _is_done(self, in_flight: _InFlight) -> bool:
        start = time.perf_counter()
        try:
            done = in_flight.saving.is_done()
        except Exception:
            self._in_flight = None  # it failed on all processes: there is nothing to complete
            raise
        in_flight.waited_s += time.perf_counter() - start
        return done

    def fit_end(self, run: Run) -> None:
        self.save_now(run)

    def settle(self) -> None:
        """Have no save in flight when this returns; every process calls it."""
        self._finish()

    def save_now(self, run: Run) -> None:
        """Have the present step on disk when this returns; every process calls it."""
        if run.state.step > self._saved_step:
            self._save(run, copy=False)
        self._finish()

    def fit_failed(self, run: Run) -> None:
        """Complete the save in flight, if what ended the run ends it on all processes alike.

        Otherwise the others may never come to complete it; no thread of it is left, though.
        """
        if self._in_flight is None:
            return
        on_all_ranks = getattr(sys.exception(), "on_all_ranks", False) or ranks.world_size() == 1
        try:
            if on_all_ranks:
                self._finish()
            else:
                self._in_flight.saving.wait()
        except (Exception, KeyboardInterrupt) as failure:
            _log.warning("the save in flight was lost: %s", failure)

    def _save(self, run: Run, *, copy: bool) -> None:
        self._finish()
        heartbeat.enter(heartbeat.SAVE)
        start = time.perf_counter()
        self._saved_step = run.state.step
        run.state.batches = run.batches.state_dict()
        run.state.objective = run.engine.objective.state_dict()
        saving = store.start(
            self._run_dir,
            content_of(run.engine),
            run.state.position(),
            keep=self._settings.keep,
            copy=copy,
            plan=self._plan,
            spared=lambda: self._copier.step if self._copier else None,
        )
        self._in_flight = _InFlight(saving, start, time.perf_counter() - start)
        if not copy:
            self._finish()
        heartbeat.enter(heartbeat.BETWEEN)

    def _finish(self) -> None:
        if self._in_flight is None:
            return
        done, self._in_flight = self._in_flight, None
        start = time.perf_counter()
        path = done.saving.finish()
        self._failed = 0
        self.saves += 1
        end = time.perf_counter()
        waited_s = done.waited_s + end - start
        _log.info("saved %s in %.1f s, training waited %.1f s", path, end - done.start, waited_s)


class CopyCheckpoints(Hook):
    """Has each checkpoint copied behind a URL once it is whole; comes after the save.

    The end of the run waits for the last copy. A run that is complete and not copied ends with an
    error; one that was stopped goes on later, and copies then.
    """

    def __init__(self, saving: SaveCheckpoints, run_dir: Path, keep: int, copier: Copier | None):
        """Take the parts.

        Args:
            saving: saves the checkpoints.
            run_dir: the run folder.
            keep: newest checkpoints that stay there.
            copier: copies them; None on all processes but the main one.
        """
        self._saving, self._run_dir, self._keep = saving, run_dir, keep
        self._copier = copier
        self._seen = -1  # saves; the first look finds what an earlier attempt has not copied

    def fit_start(self, run: Run) -> None:
        self._take()

    def step_end(self, run: Run, report: StepReport) -> None:
        self._take()

    def fit_end(self, run: Run) -> None:
        self._take()
        failure = copied(self._copier, self._run_dir, self._keep)
        if failure and run.is_complete:
            raise failure
        if failure:
            _log.warning("%s", failure)

    def fit_failed(self, run: Run) -> None:
        """Wait for the copy in flight, where nobody waits for this process meanwhile.

        Others that have not failed wait in a collective, and would end all before the error is
        told. The next start copies what is missing.
        """
        if self._copier is None or isinstance(sys.exception(), KeyboardInterrupt):
            return
        if ranks.world_size() > 1:
            return
        try:
            self._take()
            while not self._copier.wait(1):
                heartbeat.enter(heartbeat.SAVE)
        except (Exception, KeyboardInterrupt) as failure:
            _log.warning("the copy in flight was lost: %s", failure)

    def _take(self) -> None:
        if self._copier is not None and self._seen != self._saving.saves:
            self._seen = self._saving.saves
            newest = layout.latest(self._run_dir)
            if newest is not None:
                self._copier.take(newest)


def copied(copier: Copier | None, run_dir: Path, keep: int) -> UserError | None:
    """Wait for the last copy; return what forbade it; every process calls this.

    Args:
        copier: on the main process.
        run_dir: the run folder.
        keep: newest checkpoints that stay there; one that was spared for its copy may go now.
    """

    def is_over() -> bool:
        assert copier is not None, "the main process has it"
        return copier.wait(0.5)

    while not ranks.broadcast_from_main(is_over):  # no collective takes as long as a copy
        heartbeat.enter(heartbeat.SAVE)

    def concluded() -> str:
        assert copier is not None, "the main process has it"
        layout.keep_newest(run_dir, keep)
        return copier.failure

    cause = ranks.broadcast_from_main(concluded)
    if not cause:
        return None
    error = UserError(
        f"the newest checkpoint was not copied: {cause}. It is whole in {run_dir}; the same "
        "command copies it as soon as that is possible"
    )
    error.on_all_ranks = True
    return error


def content_of(engine: Engine) -> Content:
    """Name what a checkpoint of this run holds, and complete it; every process calls this."""
    held = []
    for name, network in engine.networks.items():
        data_parallel.complete_parameters(network.chunks)
        assert network.optimizer is not None, f"{name} is not trained"
        name_in_keys = name if len(engine.networks) > 1 else ""
        held.append(HeldNetwork(network.chunks, network.optimizer, network.groups, name_in_keys))
    return Content(tuple(held))


def load_weights(folder: Path, engine: Engine) -> None:
    """Begin with the weights of a checkpoint, and with new moments; every process calls this."""
    for held in content_of(engine).networks:
        read_weights(folder, held.chunks, held.groups, held.name)
        held.optimizer.reload_model_params()


class Recover(Hook):
    """Notes steps that were not taken; goes back to a checkpoint where they come in a row.

    It comes after the metrics and before the save.

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
        target = ranks.broadcast_from_main(lambda: self._target(first))
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
        error.on_all_ranks, error.kind = True, report.skipped_kind
        return error


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


class EnterPhases(Hook):
    """Calls `enter(run, phase, phase before)` between two steps of different phases."""

    def __init__(
        self, phases: Sequence[PhaseSpan], enter: Callable[[Run, PhaseSpan, PhaseSpan], None]
    ) -> None:
        self._phases = phases
        self._enter = enter
        self._present: PhaseSpan | None = None

    def fit_start(self, run: Run) -> None:
        self._present = phase_at(self._phases, run.state.tokens)

    def step_start(self, run: Run) -> None:
        phase = phase_at(self._phases, run.state.tokens)
        if phase is not self._present and self._present is not None:
            self._enter(run, phase, self._present)
            self._present = phase
