"""Saves and loads whole checkpoints: atomically, with the position and the layout of the run.

The layout that a checkpoint was saved under is for the log; nothing depends on it.
"""

import contextlib
import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybrid_train.checkpoint import layout, save_load
from hybrid_train.checkpoint.shards import Content
from hybrid_train.checkpoint.writing import (
    InThread,
    KeptSavePlan,
    Writing,
    WrittenPart,
)
from hybrid_train.megatron.optimizers import is_distributed
from hybrid_train.runtime import ranks
from hybrid_train.schema.problems import DISK, UserError

_LAYOUT_FILE = "plan.json"
SavedLayout = dict[str, int]  # parallel axis -> degree
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


@dataclass
class Saving:
    """A checkpoint that is being written; every process has one.

    When all processes have written their parts, a thread of the first one describes the whole,
    gives it its name and deletes what is older.
    """

    final: Path
    position: Mapping[str, Any]
    saved_layout: SavedLayout
    keep: int
    writing: Writing
    spared: Callable[[], int | None]  # step of a checkpoint that is being copied
    naming: InThread | None = None

    def is_done(self) -> bool:
        """Go on with what can be done, and tell whether all is; every process calls this.

        Raises:
            UserError: if a process could not write its part; see `finish`.
        """
        here = self.writing.is_done if self.naming is None else self.naming.is_done
        on_all_ranks = torch.tensor(int(here), device=torch.cuda.current_device())
        dist.all_reduce(on_all_ranks, op=dist.ReduceOp.MIN)
        if not on_all_ranks.item():
            return False
        if self.naming is not None:
            return True
        self.naming = self._start_naming()
        return False

    def wait(self) -> None:
        """Wait until this process has done its part, and leave it at that."""
        self.writing.wait()
        if self.naming is not None:
            self.naming.wait()

    def finish(self) -> Path:
        """Wait until it has its name; every process calls this.

        Raises:
            UserError: if the disk is full, or refuses; the older checkpoints are untouched.
        """
        naming = self.naming = self.naming or self._start_naming()
        with _removed_on_failure(self.final):
            ranks.run_on_main_first(naming.result)
        return self.final

    def _start_naming(self) -> InThread:
        with _removed_on_failure(self.final):
            parts = self.writing.collect()
        return InThread(lambda: self._name(parts))

    def _name(self, parts: list[WrittenPart]) -> None:
        if ranks.is_main():
            partial = _partial(self.final)
            self.writing.describe(parts)
            _publish(partial, self)


def start(
    run_dir: Path,
    content: Content,
    position: Mapping[str, Any],
    *,
    keep: int,
    copy: bool,
    plan: KeptSavePlan | None = None,
    spared: Callable[[], int | None] = lambda: None,
) -> Saving:
    """Begin to write a checkpoint of all processes; it gets its name when it is whole.

    Args:
        run_dir: the run folder.
        content: models and optimizers.
        position: step, tokens and tokens of each source; "step" names the folder.
        keep: newest checkpoints that stay.
        copy: write from a copy in host memory, so that training may go on until `finish`.
        plan: of the save before, which spares much of the time that training waits.
        spared: step of a checkpoint that stays beyond `keep`, while it is copied elsewhere.

    Raises:
        UserError: if the disk is full, or refuses; the older checkpoints are untouched.
    """
    final = layout.path_of(run_dir, position["step"])
    with _removed_on_failure(final):
        ranks.run_on_main_first(lambda: _make_empty(_partial(final)))
        writing = save_load.start_writing(
            _partial(final), content, plan or KeptSavePlan(), copy=copy
        )
    return Saving(final, position, layout_of(content), keep, writing, spared)


def save(run_dir: Path, content: Content, position: Mapping[str, Any], *, keep: int) -> Path:
    """Write a checkpoint and wait for it; see `start`."""
    return start(run_dir, content, position, keep=keep, copy=False).finish()


def load(found: layout.Found, content: Content) -> dict[str, Any]:
    """Load weights, optimizer and random states; return the position of the run.

    Raises:
        UserError: if the checkpoint is damaged, or of another model.
    """
    before, now = read_layout(found.path), layout_of(content)
    if before and before != now and ranks.is_main():
        _log.info(
            "going on under %s, saved under %s", layout_in_words(now), layout_in_words(before)
        )
    save_load.read_content(found.path, content)
    return found.position()


def newest_sound(
    run_dir: Path, set_aside: Callable[[layout.Found, str], None]
) -> layout.Found | None:
    """Find the newest checkpoint that is as it was written; every process calls this.

    Args:
        run_dir: the run folder.
        set_aside: called on the first process for each damaged one, which is there no longer then.
    """
    while (found := layout.latest(run_dir)) is not None:
        damaged = damages(found)
        if not damaged:
            return found
        ranks.run_on_main_first(lambda: set_aside(found, damaged))  # noqa: B023  called at once
    return None


def damages(found: layout.Found) -> str:
    """Compare a checkpoint with its checksums, each process its share; say what is wrong."""
    here = layout.damages(found.path, part=ranks.rank(), parts=ranks.world_size())
    on_all_ranks: list[list[str]] = [[]] * ranks.world_size()
    dist.all_gather_object(on_all_ranks, here)
    return ", ".join(one for share in on_all_ranks for one in share)


def _partial(final: Path) -> Path:
    return final.with_name(final.name + layout.PARTIAL)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(partial: Path, saving: Saving) -> None:
    write_layout(partial, saving.saved_layout)
    layout.write_position(partial, saving.position)
    layout.write_checksums(partial, saving.writing.sums)
    layout.sync(partial)
    if saving.final.exists():
        shutil.rmtree(saving.final)
    partial.rename(saving.final)
    layout.sync(saving.final.parent)
    layout.keep_newest(saving.final.parent.parent, saving.keep, saving.spared())


@contextlib.contextmanager
def _removed_on_failure(final: Path) -> Iterator[None]:
    """Remove what a save that fails has written, and explain the failure."""
    try:
        yield
    except Exception as error:
        if ranks.is_main():
            shutil.rmtree(_partial(final), ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        explained = _explained(error, final)
        explained.on_all_ranks = getattr(error, "on_all_ranks", False)
        raise explained from error


def _explained(error: OSError, final: Path) -> UserError:
    """Say what a refusal of the operating system means for the run."""
    if error.errno in _FULL:
        explained = UserError(
            f"the disk is full: {final} could not be written and was removed; older checkpoints "
            "are whole. Free space, or lower checkpoint.keep, and start again: the run resumes"
        )
    else:
        explained = UserError(
            f"{final} could not be written: {error}; older checkpoints are whole, and the same "
            "command goes on from the newest"
        )
    explained.kind = DISK
    return explained


def layout_of(content: Content) -> SavedLayout:
    """Return the degree of every parallel axis of this run."""
    held = content.networks[0]
    groups = held.groups
    split = is_distributed(held.optimizer)
    return {
        "processes": dist.get_world_size(),
        "tensor": groups.tp.size(),
        "pipeline": groups.pp.size(),
        "virtual_pipeline": len(held.chunks),
        "context": groups.cp.size(),
        "expert": groups.ep.size(),
        "expert_tensor": groups.expt_tp.size(),
        "data": groups.dp.size(),
        "distributed_optimizer": int(split),
    }


def write_layout(folder: Path, saved_layout: SavedLayout) -> None:
    """Write the layout of the run into a checkpoint."""
    (folder / _LAYOUT_FILE).write_text(json.dumps(saved_layout) + "\n", encoding="utf-8")


def read_layout(folder: Path) -> SavedLayout:
    """Return the layout that a checkpoint was saved under; empty if it does not say."""
    try:
        return dict(json.loads((folder / _LAYOUT_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def layout_in_words(saved_layout: SavedLayout) -> str:
    """Name the axes that are split: "tensor=2 data=4"; "1 process" if none is."""
    split = [
        f"{axis}={degree}"
        for axis, degree in saved_layout.items()
        if _is_worth_a_word(axis, saved_layout)
    ]
    return " ".join(split) or f"{saved_layout['processes']} process"


def _is_worth_a_word(axis: str, saved_layout: SavedLayout) -> bool:
    if axis == "processes":
        return False
    if axis == "expert_tensor":
        return saved_layout[axis] != saved_layout["tensor"]
    if axis == "distributed_optimizer":
        return not saved_layout[axis]
    return saved_layout[axis] > 1
