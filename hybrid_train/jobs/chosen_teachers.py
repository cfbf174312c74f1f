"""The checkpoints that a student learns from: found, fetched where they lie behind URLs, and whole.

Which ones they are, and that a run that goes on has the same: `distillation/teacher_record.py`.
"""

from pathlib import Path

from hybrid_train.checkpoint import layout, store
from hybrid_train.config.frozen import run_of
from hybrid_train.config.fsspec import is_remote
from hybrid_train.distillation import teacher_record
from hybrid_train.distillation.targets import targets_of
from hybrid_train.distillation.teacher_record import ChosenTeacher
from hybrid_train.jobs import fetched_checkpoint
from hybrid_train.runtime import ranks
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob


def choose_teachers(job: TrainJob, *, goes_on: bool) -> list[ChosenTeacher]:
    """Find the teachers of a run; every process calls this, before anything is written.

    Args:
        job: the run; one without teachers has none.
        goes_on: whether it goes on from a checkpoint of its own.

    Raises:
        UserError: if one is not there, damaged, or not the one that the run began with.
    """
    fetched = _fetched(job, goes_on=goes_on)
    chosen = ranks.broadcast_from_main(
        lambda: teacher_record.choose(job, goes_on=goes_on, fetched=fetched)
    )
    for one in chosen if not targets_of(job.objective) else ():
        if damaged := store.damages(one.found):
            error = UserError(f"teacher {one.found.path} is damaged: {damaged}; take another one")
            error.on_all_ranks = True
            raise error
    return chosen


def _fetched(job: TrainJob, *, goes_on: bool) -> dict[str, Path]:
    """Fetch what lies behind URLs, and return where it is; of a run that goes on the very step."""
    named = teacher_record.places(job)
    if not any(is_remote(place) for _, place in named):
        return {}
    run_dir = Path(job.run_dir)
    recorded = ranks.broadcast_from_main(
        lambda: (teacher_record.read_record(run_dir) if goes_on else None) or []
    )
    found = {}
    for number, (setting, place) in enumerate(named):
        if not is_remote(place):
            continue
        url = place
        if number < len(recorded):
            one = recorded[number]
            if ranks.is_true_on_all(lambda one=one: one.is_here):  # type: ignore[misc]
                continue
            url = f"{run_of(place)}/{layout.FOLDER}/{one.found.path.name}"
        found[place] = fetched_checkpoint.folder_of(url, setting)
    return found
