"""A run whose checkpoints also lie behind a URL: refused early, fetched if newer there, copied.

    checkpoint.url=s3://BUCKET/runs/a

What a resume needs goes there with them. An empty or older run folder gets the newest whole
checkpoint from there, so that another machine goes on with a run by the same command.
"""

import contextlib
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.copier import Copier
from hybrid_train.checkpoint.layout import POSITION, TOKENIZER
from hybrid_train.checkpoint.lineage import FILE_NAME as LINEAGE
from hybrid_train.checkpoint.mirror import Mirror
from hybrid_train.checkpoint.writing import InThread
from hybrid_train.config import frozen
from hybrid_train.config.secrets import masked
from hybrid_train.data.record import FILE_NAME as RECORD
from hybrid_train.distillation.teacher_record import FILE_NAME as TEACHERS
from hybrid_train.hf import origin
from hybrid_train.jobs import attempts, run_folder
from hybrid_train.runtime import ranks
from hybrid_train.schema import formats
from hybrid_train.schema.checkpoint import Checkpoint
from hybrid_train.schema.pruning import MASK_RANKING
from hybrid_train.schema.train import TrainJob
from hybrid_train.tracking import history
from hybrid_train.tracking.jsonl import FILE_NAME as METRICS
from hybrid_train.training.hooks.checkpointing import copied

_CONFIG = (frozen.FROZEN_NAME, formats.FILE_NAME)
# The metrics are needed, too: the losses before decide which one is a spike.
_BESIDE = (
    *_CONFIG, TOKENIZER, RECORD, TEACHERS, LINEAGE, MASK_RANKING, origin.FOLDER, METRICS,
    history.FILE_NAME,
)  # fmt: skip
_log = logging.getLogger(__name__)


def require_usable(job: TrainJob) -> None:
    """Refuse a URL that cannot be written, or holds another run.

    Raises:
        UserError: with the URL, and what to do.
    """
    if job.checkpoint.url is None:
        return
    mirror = Mirror(job.checkpoint.url)
    mirror.probe()
    steps = mirror.steps()
    if not steps:
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        mirror.fetch_beside(folder, only=_CONFIG)
        mirror.fetch_position(steps[-1], folder)
        run_folder.require_same_run_behind(job.checkpoint.url, folder, job)


def fetch_newer(url: str | None, run_dir: Path, own: layout.Found | None) -> layout.Found | None:
    """Bring the newest sound checkpoint from the URL, if it is newer; every process calls this.

    Args:
        url: of the checkpoints; None: there is none.
        run_dir: the run folder.
        own: the newest sound checkpoint in its folder.

    Returns:
        What the run goes on from.
    """
    if url is None:
        return own
    found, own_step = list[int](), own.step if own else -1

    def bring() -> None:
        found.extend(_fetched(Mirror(url), run_dir, own_step))

    work = InThread(bring if ranks.is_main() else lambda: None, is_left=True)
    while not ranks.broadcast_from_main(lambda: _is_over(work)):
        pass  # no collective takes as long as a copy
    ranks.run_on_main_first(work.result)
    step = ranks.broadcast_from_main(lambda: found[0] if found else None)
    return own if step is None else layout.Found(layout.path_of(run_dir, step), step)


def _is_over(work: InThread) -> bool:
    work.wait(0.5)
    return work.is_done


def _fetched(mirror: Mirror, run_dir: Path, own_step: int) -> list[int]:
    """Fetch what is newer than the own step; return the step that is sound, if there is one."""
    newer = [step for step in mirror.steps() if step > own_step]
    for step in reversed(newer):
        _log.info("fetching step %d from %s", step, masked(mirror.url))
        damaged = mirror.fetch(step, run_dir)
        if not damaged:
            _bring_beside(mirror, run_dir)
            layout.Found(layout.path_of(run_dir, step), step).require_readable()
            return [step]
        if POSITION in mirror.files_of(step):
            mirror.set_aside(step)
        instead = max([own_step, *(one for one in newer if one < step)])
        words = f"step {instead}" if instead >= 0 else "the start"
        _log.warning("step %d at %s is damaged: %s", step, masked(mirror.url), damaged)
        _log.warning(
            "it is no longer taken for whole (its position is position.json.damaged), and the run "
            "goes on from %s",
            words,
        )
        history.note(run_dir, "fallback", step=step, damage=damaged, instead=words)
    return []


def _bring_beside(mirror: Mirror, run_dir: Path) -> None:
    """Bring what belongs to a fetched checkpoint; a fetch that is cut off leaves the folder alone.

    What happened in this folder since stays in its history, behind what the other has.
    """
    own = run_dir / history.FILE_NAME
    before = own.read_bytes().splitlines(keepends=True) if own.is_file() else []
    with TemporaryDirectory(dir=run_dir, prefix=".fetched-") as name:
        mirror.fetch_beside(Path(name))
        fetched = Path(name) / history.FILE_NAME
        known = fetched.read_bytes() if fetched.is_file() else b""
        fetched.write_bytes(known + b"".join(line for line in before if line not in known))
        for path in sorted(one for one in Path(name).rglob("*") if one.is_file()):
            place = run_dir / path.relative_to(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    attempts.conclude(run_dir)


def start_copier(settings: Checkpoint, run_dir: Path) -> Copier | None:
    """Start what copies the checkpoints; on the main process only, the others have none.

    Every process calls this.

    Raises:
        UserError: if the URL cannot be written any more.
    """
    url, started = settings.url, list[Copier]()
    if url is None:
        return None

    def note(step: int, cause: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the copies
            history.note(run_dir, "copy failed", step=step, cause=cause)

    def begin() -> None:
        beside = [run_dir / name for name in _BESIDE]
        keep, patience_s = settings.keep, settings.url_patience_s
        started.append(Copier(url, run_dir, beside, keep=keep, patience_s=patience_s, note=note))

    ranks.run_on_main_first(begin)
    return started[0] if started else None


def copy_complete(settings: Checkpoint, run_dir: Path) -> None:
    """Copy what a run that is complete has not copied yet, and note that it is complete.

    Every process calls this.

    Raises:
        UserError: if that is not possible.
    """
    if settings.url is None:
        ranks.run_on_main_first(lambda: attempts.complete(run_dir))
        return
    copier = start_copier(settings, run_dir)
    newest = layout.latest(run_dir)
    if copier is not None and newest is not None:
        copier.take(newest)
    if failure := copied(copier, run_dir, settings.keep):
        raise failure
    if copier is not None:
        attempts.complete(run_dir)
        copier.close()
