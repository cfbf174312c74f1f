"""Saves and loads whole checkpoints: atomically, with the position of the run."""

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from hybrid_train.checkpoint import layout, megatron
from hybrid_train.checkpoint.megatron import Content
from hybrid_train.checkpoint.retention import keep_newest
from hybrid_train.config.problems import UserError
from hybrid_train.runtime import ranks

_PROBE_BYTES = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)


def save(run_dir: Path, content: Content, position: Mapping[str, int], *, keep: int) -> Path:
    """Write a checkpoint of all processes; it appears under its name when it is whole.

    Args:
        run_dir: the run folder.
        content: model and optimizer.
        position: step, tokens and sequences; "step" names the folder.
        keep: newest checkpoints that stay.

    Raises:
        UserError: if the disk is full; the older checkpoints are untouched.
    """
    final = layout.path_of(run_dir, position["step"])
    partial = final.with_name(final.name + layout.PARTIAL)
    try:
        ranks.main_first(lambda: _empty(partial))
        megatron.write(partial, content)
        ranks.main_first(lambda: _publish(partial, final, position, keep))
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        explained = _explained(error, partial, final)
        if ranks.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise explained from error
    return final


def load(found: layout.Found, content: Content) -> dict[str, int]:
    """Load weights, optimizer and random states; return the position of the run.

    Raises:
        UserError: if the checkpoint is damaged.
    """
    try:
        megatron.read(found.path, content)
    except CheckpointException as error:
        raise UserError(
            f"{found.path} is damaged: {_causes(error)}; remove it, and the same command goes on "
            "from the checkpoint before"
        ) from error
    return found.position()


def _causes(error: CheckpointException) -> str:
    return ", ".join(f"{failure[0]} (rank {rank})" for rank, failure in error.failures.items())


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(partial: Path, final: Path, position: Mapping[str, int], keep: int) -> None:
    layout.write_position(partial, position)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    keep_newest(final.parent.parent, keep)


def _explained(error: BaseException, partial: Path, final: Path) -> BaseException:
    """Turn a full disk into words."""
    if isinstance(error, CheckpointException) and not ranks.is_main():
        told = UserError(f"{final} could not be written; the first process says why")
        told.everywhere = True
        return told
    if getattr(error, "errno", None) in _FULL or _is_full(partial):
        return UserError(
            f"the disk is full: {final} could not be written and was removed; older checkpoints "
            "are whole. Free space, or lower checkpoint.keep, and start again: the run resumes"
        )
    return error


def _is_full(folder: Path) -> bool:
    """Tell whether the disk takes no more: Megatron does not pass on why a write failed."""
    try:
        (folder / "probe").write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        return error.errno in _FULL
    return False
