"""A checkpoint behind a URL becomes a folder here, once a machine, and is loaded as any other.

    s3://BUCKET/runs/a -> ~/.cache/hybrid_train/checkpoints/a-1f3c9a07b2d4/checkpoints/step_00000500

What is here already and the same there is not fetched again. Nothing there is changed, so it may be
a place that this machine can only read.
"""

import fcntl
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.layout import CHECKSUMS, POSITION, TOKENIZER, Found
from hybrid_train.checkpoint.lineage import FILE_NAME as LINEAGE
from hybrid_train.checkpoint.mirror import Mirror
from hybrid_train.config import frozen
from hybrid_train.config.fsspec import cache_folder, is_remote
from hybrid_train.config.secrets import masked
from hybrid_train.hf import origin
from hybrid_train.runtime import ranks
from hybrid_train.schema import formats
from hybrid_train.schema.problems import UserError

_BESIDE = (frozen.FROZEN_NAME, formats.FILE_NAME, TOKENIZER, LINEAGE, origin.FOLDER)
_log = logging.getLogger(__name__)


def folder_of(source: str, setting: str) -> Path:
    """Return the folder that a setting means: itself, or what lies behind its URL, fetched.

    Every process calls this; several know each other by then.

    Args:
        source: a run folder, one of its checkpoints, or the URL of either; of a run the newest
            whole checkpoint is taken.
        setting: that says so, for messages.

    Raises:
        UserError: if there is no whole checkpoint, or it cannot be fetched.
    """
    if not is_remote(source):
        return Path(source)
    if ranks.world_size() == 1:
        return _fetched(source, _step_behind(source, setting), setting)
    from hybrid_train.checkpoint.writing import InThread  # Megatron comes with it

    # A run that still trains there saves another one meanwhile; all processes take the same.
    step = ranks.broadcast_from_main(lambda: _step_behind(source, setting))
    found = list[Path]()
    work = InThread(lambda: found.append(_fetched(source, step, setting)), is_left=True)

    def is_over() -> bool:
        work.wait(0.5)
        return work.is_done

    while not ranks.is_true_on_all(is_over):
        pass  # no collective takes as long as a fetch
    ranks.all_or_none(work.result)
    return found[0]


def _step_behind(source: str, setting: str) -> int:
    """Return the step of the checkpoint that is meant.

    Raises:
        UserError: if it is not whole there; says which are.
    """
    mirror = Mirror(frozen.run_of(source), setting=setting)
    whole = mirror.steps()
    name = source.rstrip("/").removeprefix(mirror.url).rpartition("/")[2]
    wanted = layout.step_of(name) if name else max(whole, default=None)
    if wanted in whole and wanted is not None:
        return wanted
    url = masked(source)
    if not whole:
        raise UserError(
            f"{setting} = {url}: there is no whole checkpoint; give the URL of a run, which has "
            f"{layout.FOLDER}/step_*/{POSITION}, or of one of its {layout.FOLDER}/step_*"
        )
    there = ", ".join(layout.path_of(Path(), step).name for step in whole)
    raise UserError(f"{setting} = {url}: it is not whole there; whole ones are {there}")


def _fetched(source: str, step: int, setting: str) -> Path:
    """Fetch a checkpoint unless it is here; one process of a machine at a time."""
    mirror = Mirror(frozen.run_of(source), setting=setting)
    folder = _place(mirror.url)
    found = Found(layout.path_of(folder, step), step)
    with _locked(folder):
        if (found.path / CHECKSUMS).is_file() and mirror.is_equal(found):
            return found.path
        size = mirror.size_of(step)
        _require_space(size, folder, found.path, setting)
        start = time.perf_counter()
        _log.info(
            "fetching step %d (%.1f MB) from %s to %s",
            *(step, size / 1e6, masked(mirror.url), found.path),
        )
        mirror.fetch_beside(folder, only=_BESIDE)
        if damaged := mirror.fetch(step, folder):
            raise UserError(
                f"{setting} = {masked(source)}: step {step} is damaged there: {damaged}; take "
                f"another of {masked(mirror.url)}/{layout.FOLDER}/step_*"
            )
        _log.info(
            "fetched in %.1f s; whoever loads it again takes it from there, and it may be deleted",
            time.perf_counter() - start,
        )
    return found.path


def _place(url: str) -> Path:
    """Return the folder of what is fetched from a run, named as the run is, and for it alone."""
    name = re.sub(r"[^\w.-]", "_", masked(url).rpartition("/")[2])[-80:]
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return cache_folder("checkpoints") / f"{name}-{digest}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and let one process at a time go on.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot keep a fetched checkpoint in {folder}: {error.strerror}; set XDG_CACHE_HOME "
            "to a folder that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _require_space(size: int, folder: Path, final: Path, setting: str) -> None:
    """Refuse what does not fit, less what a fetch that was cut off has brought.

    Raises:
        UserError: with the room that is needed and the room that is there.
    """
    partial = final.with_name(final.name + layout.PARTIAL)
    here = sum(one.stat().st_size for one in partial.iterdir()) if partial.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if free < size - here:
        raise UserError(
            f"the disk is full: the checkpoint of {setting} has {size / 1e6:.0f} MB, and {folder} "
            f"has {free / 1e6:.0f} MB free; free space, or set XDG_CACHE_HOME to another folder"
        )
