"""Gateway to Megatron's distributed checkpoints: what is stored, under which global names."""

import json
import logging
import pickle
import queue
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from hybrid_train.checkpoint import safe_metadata
from hybrid_train.checkpoint.differences import Stored, compare
from hybrid_train.checkpoint.optimizer_state import (
    MASTER,
    STEP,
    StatePart,
    set_step_count,
    state_key,
    state_of,
    state_parts,
    step_count,
)
from hybrid_train.checkpoint.partition import is_partition
from hybrid_train.checkpoint.places import places
from hybrid_train.config.problems import UserError
from hybrid_train.runtime import ranks
from hybrid_train.runtime.seeds import random_state, restore_random_state

safe_metadata.install()  # no checkpoint runs code, whoever wrote it
# What reading damaged files raises; CheckpointException is no Exception.
_DAMAGED = (
    safe_metadata.UnreadableError,
    CheckpointException,
    CheckpointingException,
    OSError,
    EOFError,
    json.JSONDecodeError,
    pickle.UnpicklingError,
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds."""

    chunks: list[Any]  # model chunks of this process, wrapped for data parallelism
    optimizer: MegatronOptimizer
    groups: ProcessGroupCollection


class _Strategy(TorchDistSaveShardedStrategy):
    """Keeps the writer and its plan: the writing and the end of a save are ours.

    In core 0.19.2 a failed write loses its reason on the way (filesystem_async.py 292), and where
    the first process cannot write the description of the checkpoint, the others wait for it without
    end (state_dict_saver.py 245).
    """

    writer: FileSystemWriterAsync
    metadata: Metadata | None  # of the whole checkpoint; on the first process

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, strategy: str) -> Any:
        self.writer, self.metadata, _ = planned
        return super()._get_save_and_finalize_callbacks(writer, planned, strategy)


@dataclass
class _Part:
    """What came of the part of one process."""

    results: list[WriteResult] = field(default_factory=list)
    failure: str = ""
    errno: int | None = None  # of the operating system, if the failure came from there


class Writing:
    """A checkpoint that a thread of this process writes, with those of the other processes."""

    def __init__(self, folder: Path, strategy: _Strategy) -> None:
        self._folder = folder
        self._strategy = strategy
        self._part = _Part()
        self._thread = threading.Thread(target=self._write, name="checkpoint")
        self._thread.start()

    def _write(self) -> None:
        """Write what is in host memory already: a thread has its own current CUDA device."""
        writer = self._strategy.writer
        try:
            for number, bucket in enumerate(writer.write_buckets or ()):
                _, outcome = writer.write_preloaded_data(
                    [writer.transforms], number, bucket, None, None, use_fsync=True
                )
                if isinstance(outcome, Exception):
                    raise outcome
                self._part.results += outcome
        except BaseException as error:  # told to all processes by `finish`
            self._part.failure = f"{type(error).__name__}: {error}"
            self._part.errno = _errno(error)
            _let_go(error)

    @property
    def is_done(self) -> bool:
        """Whether this process has written its part."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for this process alone."""
        self._thread.join()

    def finish(self) -> None:
        """Wait for all processes, then describe the whole; every process calls this.

        Raises:
            OSError: on the first process, with its number, if the system of any refused to write.
            RuntimeError: on the first process, if anything else failed.
            UserError: on the others, with the same words.
        """
        self.wait()
        parts: list[Any] | None = [None] * dist.get_world_size() if ranks.is_main() else None
        dist.gather_object(self._part, parts)
        ranks.main_first(lambda: self._describe(parts or []))

    def _describe(self, parts: list[_Part]) -> None:
        failed = [(rank, part) for rank, part in enumerate(parts) if part.failure]
        if failed:
            words = ", ".join(f"{part.failure} (rank {rank})" for rank, part in failed)
            numbers = [part.errno for _, part in failed if part.errno is not None]
            raise OSError(numbers[0], words) if numbers else RuntimeError(words)
        self._strategy.writer.finish(self._strategy.metadata, [part.results for part in parts])
        config = CheckpointingConfig(self._strategy.backend, self._strategy.version)
        save_config(config, str(self._folder))


def _errno(error: BaseException | None) -> int | None:
    """Find the number of the system's error that led to this one: torch's writer covers it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _let_go(error: BaseException | None) -> None:
    """Free what failed: torch 2.11 crashes where garbage collection frees a zip file cut short."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _is_whole(global_plan: list[SavePlan], metadata: Metadata) -> bool:
    """Tell whether a checkpoint that is planned holds every element of every tensor once."""
    tensors = metadata.state_dict_metadata.values()
    return all(
        is_partition(tensor.size, tensor.chunks)
        for tensor in tensors
        if isinstance(tensor, TensorStorageMetadata)
    )


# torch 2.11 sweeps along the longest axis, where every expert meets every other.
default_planner._validate_global_plan = _is_whole


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
    ranks.together(lambda: _to_host(tensors, copy=copy))
    # Megatron core 0.19.2 would start a process for this queue (filesystem_async.py 65), which
    # takes as long as the start of the run; nothing goes through it.
    filesystem_async._results_queue = queue.Queue()
    strategy = _Strategy()
    dist_checkpointing.save(
        _numbered(tensors), str(folder), strategy, async_sharded_save=True, async_strategy="mcore"
    )
    return Writing(folder, strategy)


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


def _to_host(tensors: Iterable[ShardedTensor], *, copy: bool) -> None:
    """Bring what this process will write to host memory; from a GPU all are under way at once.

    Raises:
        UserError: if there is not enough of it.
    """
    ours = [tensor for tensor in tensors if is_main_replica(tensor.replica_id)]
    needed = sum(tensor.data.nbytes for tensor in ours)
    try:
        for tensor in ours:
            tensor.data = tensor.data.detach().to("cpu", non_blocking=True, copy=copy)
        torch.cuda.synchronize()
    except (MemoryError, RuntimeError) as error:  # torch has no error of its own for host memory
        raise UserError(
            f"no copy of what this process saves, {needed / 1e6:.0f} MB, in host memory: {error}"
        ) from error


def _numbered(tensors: Iterable[ShardedTensor]) -> dict[str, ShardedTensor]:
    """Make the dictionary that Megatron asks for; its keys do not reach the file."""
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def read(folder: Path, content: Content) -> None:
    """Load model, optimizer and, on as many processes as before, random states.

    Raises:
        UserError: if the checkpoint is of another model; MTP alone may be more or less.
    """
    stored = _stored_in(folder)
    found = places(content.chunks, content.groups)
    differences = compare(folder, stored, found)
    _require_optimizer_state(folder, stored)
    state = state_of(content.optimizer, found)
    steps = torch.zeros(1, dtype=torch.int64)
    random = _sharded_random_state()
    # Their sizes tell the number of processes, and the kind of device.
    same_random = all(
        part.key in stored and part.global_shape == stored[part.key].global_shape
        for part in random.values()
    )
    _load(
        folder,
        [
            *(_best_of(place.weight, stored) for place in differences.shared(found)),
            *(part.tensor for part in state.parts if part.is_stored(stored)),
            ShardedTensor.from_rank_offsets(STEP, steps, replica_id=dist.get_rank()),
            *(random.values() if same_random else ()),
        ],
    )
    new = [part for part in state.parts if not part.is_stored(stored)]
    _begin(folder, new, stored)
    state.put_back()
    set_step_count(content.optimizer, int(steps.item()))
    if same_random:
        restore_random_state({name: part.data[0] for name, part in random.items()})
    elif ranks.is_main():
        _log.warning(
            "another number of processes or kind of device than before: random states start anew"
        )


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
    stored = _stored_in(folder)
    shared = compare(folder, stored, found).shared(found)
    _load(folder, [place.weight for place in shared])


def _load(folder: Path, tensors: list[ShardedTensor]) -> None:
    """Load into the memory of the tensors; every process calls this."""
    memory = [tensor.data.data_ptr() for tensor in tensors]
    loaded = _reading(folder, lambda: dist_checkpointing.load(_numbered(tensors), str(folder)))
    assert memory == [loaded[str(number)].data_ptr() for number in range(len(tensors))]


def _stored_in(folder: Path) -> Stored:
    """List the tensors of a checkpoint; every process calls this."""
    return _reading(folder, lambda: dist_checkpointing.load_tensors_metadata(str(folder)))


def _reading[T](folder: Path, work: Callable[[], T]) -> T:
    """Do what reads a checkpoint.

    Raises:
        UserError: on all processes, if any of them finds it damaged.
    """

    def explained() -> T:
        try:
            return work()
        except _DAMAGED as error:
            failures = getattr(error, "failures", {}).values()
            causes = ", ".join(str(failure[0]) for failure in failures) or error
            raise UserError(
                f"{folder} is damaged: {causes}; remove it, and the checkpoint before it is taken"
            ) from error

    return ranks.together(explained)


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
