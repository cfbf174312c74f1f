"""Where a run begins: its folder is claimed, and the checkpoint found that it goes on from."""

import logging
from dataclasses import dataclass
from pathlib import Path

from hybrid_train.anatomy import counts
from hybrid_train.checkpoint import layout, store
from hybrid_train.checkpoint.layout import drop_partial
from hybrid_train.compression.mask import selection_of_run
from hybrid_train.compression.ranking import read_for
from hybrid_train.data.run_data import check_data
from hybrid_train.jobs import attempts, fetched_checkpoint, mirrored_run, run_folder
from hybrid_train.runtime import ranks
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.pruning import Mask
from hybrid_train.schema.train import TrainJob
from hybrid_train.tracking import history
from hybrid_train.training.loop import TrainState

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
        mirrored_run.require_usable(job)
        for leftover in drop_partial(run_dir):
            _log.warning("removed %s, which an interrupted save left behind", leftover)
        attempts.conclude(run_dir)

    ranks.run_on_main_first(check)
    newest = store.newest_sound(run_dir, _set_aside)
    own = mirrored_run.fetch_newer(job.checkpoint.url, run_dir, newest)
    if own is not None:
        _log.info("going on from %s", own.path)
        return Start(own, is_own=True)
    if job.checkpoint.load is None:
        return Start(None)
    found = layout.locate(fetched_checkpoint.folder_of(job.checkpoint.load, "checkpoint.load"))
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


def require_masks(job: TrainJob, start: Start) -> None:
    """See that the model can be masked as asked, by a ranking of what the run starts from.

    Raises:
        UserError: if it cannot, or the ranking is of another checkpoint.
    """
    for one in job.edits:
        if isinstance(one, Mask):
            if one.ranking is not None and not start.is_own:
                if start.found is None:
                    rule = "must be the checkpoint that the ranking of the mask was made of"
                    raise ConfigError([Problem("checkpoint.load", "null", rule)])
                read_for(Path(one.ranking), start.found)
            assert job.model.vocab_size is not None, "the data is open"
            own = Path(job.run_dir) if start.is_own else None
            selection_of_run(one, job, own, job.model.vocab_size)
