"""The start of a run: its folder is claimed, its data opened, its state restored."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_train.anatomy import counts
from hybrid_train.checkpoint import layout, store
from hybrid_train.checkpoint.layout import drop_partial
from hybrid_train.config import frozen
from hybrid_train.data.record import changes, read_record, record_of
from hybrid_train.data.run_data import RunData, check_data, open_data
from hybrid_train.jobs import attempts, run_folder
from hybrid_train.jobs.text_progress import TextProgress
from hybrid_train.planning.phases import PhaseSpan, unread_sources
from hybrid_train.runtime import ranks
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.tracking import history
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.training.bad_steps import BadSteps
from hybrid_train.training.hooks.checkpointing import content_of, load_weights
from hybrid_train.training.loop import Run, TrainState

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins: nowhere, its own newest checkpoint, or one of another run."""

    found: layout.Found | None
    weights_only: bool = False
    is_own: bool = False

    @property
    def own_step(self) -> int:
        """Step of the checkpoint in the run's own folder; -1 if it has none yet."""
        return self.found.step if self.found and self.is_own else -1

    def state(self) -> TrainState:
        """Return the position to go on from."""
        if self.found is None or self.weights_only:
            return TrainState()
        return TrainState(**self.found.position())


def claim(job: TrainJob) -> Start:
    """Refuse what cannot run before anything is written, and find where to start."""
    run_dir = Path(job.run_dir)

    def check() -> None:
        run_folder.require_access(run_dir)
        run_folder.require_readable(run_dir)
        attempts.require_alone(run_dir)
        run_folder.require_same_run(job)
        check_data(job.data)
        sizes = counts.parameters(job.model, job.model.vocab_size or _asked_vocab_size(job))
        run_folder.require_space(run_dir, sizes.total)
        for leftover in drop_partial(run_dir):
            _log.warning("removed %s, which an interrupted save left behind", leftover)
        attempts.conclude(run_dir)

    ranks.run_on_main_first(check)
    own = store.newest_sound(run_dir, _set_aside)
    if own is not None:
        _log.info("going on from %s", own.path)
        return Start(own, is_own=True)
    if job.checkpoint.load is None:
        return Start(None)
    found = layout.locate(Path(job.checkpoint.load))
    run_folder.require_same_model(job, found)
    if damaged := store.damages(found):
        error = UserError(f"{found.path} is damaged: {damaged}; take another checkpoint")
        error.on_all_ranks = True
        raise error
    weights_only = job.checkpoint.load_only is not None
    _log.info("starting from %s of %s", "the weights" if weights_only else "all", found.path)
    return Start(found, weights_only)


def _set_aside(found: layout.Found, damaged: str) -> None:
    place = layout.set_aside(found)
    before = layout.latest(found.run_dir)
    instead = f"step {before.step}" if before else "the start"
    _log.warning("%s is damaged: %s", found.path, damaged)
    _log.warning("it is now %s, and the run goes on from %s", place, instead)
    history.note(found.run_dir, "fallback", step=found.step, damage=damaged, instead=instead)


def _asked_vocab_size(job: TrainJob) -> int:
    return job.data.vocab_size if isinstance(job.data, Quickstart) else 0


def open_run_data(job: TrainJob, phase_spans: list[PhaseSpan], start: Start) -> RunData:
    """Open the data of a run, and give the job and its phases the vocabulary.

    Raises:
        UserError: if the tokenizer has more tokens than the model.
    """
    with TextProgress(terminal=sys.stderr.isatty()) as shown:
        data = open_data(
            job, phase_spans, barrier=ranks.barrier, is_main=ranks.is_main(), report=shown.update
        )
    if job.model.vocab_size is None:
        # Weights keep their vocabulary, also where another one would fit into the same padding.
        loaded = frozen.load(start.found.run_dir).model.vocab_size if start.found else None
        for phase_job in (job, *(phase_span.job for phase_span in phase_spans)):
            phase_job.model.vocab_size = loaded or data.vocab_size
    assert job.model.vocab_size is not None
    if unread := unread_sources(job):
        _log.info(
            "the phases name sources (%s), this run has none: all phases read %s",
            ", ".join(unread),
            "the quickstart" if isinstance(job.data, Quickstart) else "data.train",
        )
    if job.model.vocab_size < data.vocab_size:
        remedy = (
            f"the weights of {start.found.run_dir} have no more rows; take its tokenizer, "
            "and data that it made"
            if start.found
            else "leave model.vocab_size out to take its size"
        )
        raise UserError(
            f"model.vocab_size = {job.model.vocab_size}: the tokenizer has {data.vocab_size} "
            f"tokens; {remedy}"
        )
    for line in data.description():
        _log.info("%s", line)
    return data


def same_data(job: TrainJob, data: RunData, state: TrainState) -> dict[str, Any]:
    """Return the record of the data; refuse to go on with other data, unless that is accepted."""
    run_dir, now = Path(job.run_dir), record_of(data)
    before = read_record(run_dir)
    found = changes(before, now) if before else []
    if found and not job.data.accept_changes:
        lines = "\n".join(f"  {line}" for line in found)
        error = UserError(
            f"the data of {run_dir} has changed since step {state.step}:\n{lines}\nBring it back, "
            "or go on with what is there: data.accept_changes=true (it is noted in the run folder)"
        )
        error.on_all_ranks = True
        raise error
    for line in found:
        _log.warning("%s; accepted", line)
    if found and ranks.is_main():
        history.note(run_dir, "data changed", step=state.step, changes=found)
    return now


def restore(start: Start, run: Run) -> None:
    """Load what a run starts from: weights alone, or all that belongs to its position."""
    engine = run.engine
    if start.found is None:
        return
    if start.weights_only:
        load_weights(start.found.path, engine)
    else:
        store.load(start.found, content_of(engine))
        run.batches.load_state_dict(run.state.batches)


def bad_steps(job: TrainJob, start: Start, phase_start: int) -> BadSteps:
    """Go on to judge losses with those that a run that goes on has had in this phase."""

    def before() -> list[dict[str, float]]:
        path = Path(job.run_dir) / FILE_NAME
        lines = read_metrics(path) if start.is_own and path.exists() else []
        known = (line for line in lines if line["step"] <= start.own_step)
        return [line for line in known if line["tokens"] > phase_start]

    lines = ranks.broadcast_from_main(lambda: before()[-2 * job.recovery.spike_window :])
    return BadSteps(job.recovery, lines)
