"""Gateway to Megatron's distributed checkpoints: what is stored, under which global names."""

import logging
import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from hybrid_train.checkpoint.differences import Stored, compare
from hybrid_train.checkpoint.optimizer_state import (
    MASTER,
    STEP,
    StatePart,
    set_step_count,
    state_key,
    state_parts,
    step_count,
)
from hybrid_train.checkpoint.places import places
from hybrid_train.config.problems import UserError
from hybrid_train.runtime import ranks
from hybrid_train.runtime.seeds import random_state, restore_random_state

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds."""

    chunks: list[Any]  # model chunks of this process, wrapped for data parallelism
    optimizer: MegatronOptimizer
    groups: ProcessGroupCollection


class Writing:
    """A checkpoint that a thread of this process writes, with those of the other processes."""

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self._thread = threading.Thread(target=self._write, name="checkpoint")
        self._thread.start()

    def _write(self) -> None:
        if self._request.async_fn is None:  # all that is here is written by others
            return
        rank, _, results = self._request.async_fn_args
        try:
            self._request.async_fn(rank, self._request.preload_fn(), results)
        except BaseException as error:  # told to all processes by `finish`
            results.put(RuntimeError(f"{type(error).__name__}: {error}"))

    @property
    def is_done(self) -> bool:
        """Whether this process has written its part."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for this process, then complete the checkpoint; every process calls this.

        Raises:
            CheckpointException: on every process, if any of them could not write.
        """
        self._thread.join()
        for conclude in self._request.finalize_fns:
            conclude()


def write(folder: Path, content: Content) -> None:
    """Write model, optimizer and random states into an empty folder; every process calls this."""
    start_writing(folder, content, copy=False).finish()


def start_writing(folder: Path, content: Content, *, copy: bool) -> Writing:
    """Begin to write into an empty folder; every process calls this.

    Args:
        folder: where to.
        content: model and optimizer.
        copy: write from a copy in host memory, so that training may go on meanwhile.
    """
    tensors = _stored(content)
    if copy:
        _copy_to_host(tensors)
    # Megatron core 0.19.2 would start a process for this queue (filesystem_async.py 65), which
    # takes as long as the start of the run; all is written by threads of this process.
    filesystem_async._results_queue = queue.Queue()
    request = dist_checkpointing.save(
        _numbered(tensors), str(folder), async_sharded_save=True, async_strategy="mcore"
    )
    return Writing(request)


def _stored(content: Content) -> list[ShardedTensor]:
    found = places(content.chunks, content.groups)
    state = state_parts(content.optimizer, found)
    steps = torch.tensor([step_count(content.optimizer)])
    return [
        *(place.weight for place in found),
        *(part.tensor for part in state),
        ShardedTensor.from_rank_offsets(STEP, steps, replica_id=dist.get_rank()),
        *_sharded_random_state().values(),
    ]


def _copy_to_host(tensors: Iterable[ShardedTensor]) -> None:
    """Replace what this process will write by copies; from a GPU all are under way at once."""
    for tensor in tensors:
        if is_main_replica(tensor.replica_id):
            tensor.data = tensor.data.detach().to("cpu", non_blocking=True, copy=True)
    torch.cuda.synchronize()


def _numbered(tensors: Iterable[ShardedTensor]) -> dict[str, ShardedTensor]:
    """Make the dictionary that Megatron asks for; its keys do not reach the file."""
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def read(folder: Path, content: Content) -> None:
    """Load model, optimizer and, on as many processes as before, random states.

    Raises:
        UserError: if the checkpoint is of another model; MTP alone may be more or less.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    found = places(content.chunks, content.groups)
    differences = compare(folder, stored, found)
    _require_optimizer_state(folder, stored)
    state = state_parts(content.optimizer, found)
    steps = torch.zeros(1, dtype=torch.int64)
    random = _sharded_random_state()
    same_world = all(part.global_shape == stored[part.key].global_shape for part in random.values())
    _load(
        folder,
        [
            *(_best_of(place.weight, stored) for place in differences.shared(found)),
            *(part.tensor for part in state if part.is_stored(stored)),
            ShardedTensor.from_rank_offsets(STEP, steps, replica_id=dist.get_rank()),
            *(random.values() if same_world else ()),
        ],
    )
    new = [part for part in state if not part.is_stored(stored)]
    _begin(folder, new, stored)
    set_step_count(content.optimizer, int(steps.item()))
    if same_world:
        restore_random_state({name: part.data[0] for name, part in random.items()})
    elif ranks.is_main():
        _log.warning("another number of processes than before: random states start anew")


def _require_optimizer_state(folder: Path, stored: Stored) -> None:
    if STEP not in stored:
        error = UserError(
            f"{folder} holds no optimizer state that this version reads; start from its weights: "
            "checkpoint.load_only=weights run_dir=..."
        )
        error.everywhere = True
        raise error


def read_weights(folder: Path, chunks: list[Any], groups: ProcessGroupCollection) -> None:
    """Load the weights alone, into wrapped or bare model chunks; every process calls this.

    Raises:
        UserError: if the checkpoint is of another model; MTP alone may be more or less.
    """
    found = places(chunks, groups)
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    shared = compare(folder, stored, found).shared(found)
    _load(folder, [place.weight for place in shared])


def _load(folder: Path, tensors: list[ShardedTensor]) -> None:
    """Load into the memory of the tensors."""
    memory = [tensor.data.data_ptr() for tensor in tensors]
    loaded = dist_checkpointing.load(_numbered(tensors), str(folder))
    assert memory == [loaded[str(number)].data_ptr() for number in range(len(tensors))]


def _best_of(weight: ShardedTensor, stored: Stored) -> ShardedTensor:
    """Take a float32 weight from its master, where the run that saved it kept one."""
    master = state_key(MASTER, weight.key)
    if weight.dtype == torch.float32 and master in stored:
        return replace(weight, key=master)
    return weight


def _begin(folder: Path, new: list[StatePart], stored: Stored) -> None:
    """Begin state that is not in the checkpoint: moments at zero, masters with their weights."""
    for part in new:
        if part.kind != MASTER:
            part.tensor.data.zero_()
    masters = [part for part in new if part.kind == MASTER and part.weight_key in stored]
    _load(folder, [replace(part.tensor, key=part.weight_key) for part in masters])


def _sharded_random_state() -> dict[str, ShardedTensor]:
    """Give the states of this process its row of a table over all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(
            f"random.{name}", state.unsqueeze(0), (0, rank, world)
        )
        for name, state in random_state().items()
    }
