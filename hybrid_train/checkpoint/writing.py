"""A checkpoint is written by a thread beside training, and its plan kept for the next save.

A plan says under which name, and where in which file, each of some thousand tensors is written; to
make one takes several times as long as to copy the tensors. It is used again as long as all
processes find what it was made for: tensors of the same names, sizes and places in the whole model.

Which tensors there are is found out again, too, only when weights or optimizer state lie elsewhere
in memory. What a plan was made for stays alive with it, so that its memory is nobody else's.
"""

import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.optimizer_state import MASTER, StatePart, kept_tensors, state_parts
from hybrid_train.checkpoint.shards import (
    Content,
    Shard,
    bare,
    shards_of,
)
from hybrid_train.megatron import data_parallel
from hybrid_train.megatron.checkpoints import (
    ShardedTensor,
    Writer,
    is_in_fp8,
    is_main_replica,
    mark_as_megatrons,
)
from hybrid_train.runtime import ranks

_Address = tuple[int, torch.Size, torch.dtype]


class KeptSavePlan:
    """The plan of a save, and what it was made for: kept from one save of a run to the next."""

    def __init__(self) -> None:
        self._memory: list[_Address] | None = None
        self._tensors: list[ShardedTensor] = []
        self._plan: _Plan | None = None

    def tensors(self, content: Content) -> list[ShardedTensor]:
        """List weights and optimizer state of this process, in their own memory."""
        if self._memory is None or self._memory != _memory(content):
            self._tensors = []
            for held in content.networks:
                found = shards_of(held.chunks, held.groups, network=held.name)
                state = state_parts(held.optimizer, found)
                self._tensors += [*_weights(found, state), *(part.tensor for part in state)]
            self._memory = _memory(content)
        return self._tensors

    def fits(self, tensors: Sequence[ShardedTensor]) -> bool:
        """Tell whether all processes can use the plan; every process calls this."""
        here = self._plan is not None and self._plan.described == _described(tensors)
        on_all_ranks = torch.tensor(int(here), device=torch.cuda.current_device())
        dist.all_reduce(on_all_ranks, op=dist.ReduceOp.MIN)
        return bool(on_all_ranks.item())

    def keep(
        self,
        tensors: Sequence[ShardedTensor],
        writer: Writer,
        metadata: Metadata | None,
    ) -> None:
        """Take over the plan that Megatron has made for these tensors."""
        numbers = {
            (tensor.key, tuple(tensor.global_offset)): number
            for number, tensor in enumerate(tensors)
            if is_main_replica(tensor.replica_id)
        }
        files = [
            _PlannedFile(name, objects, [(item, numbers[_key_of(item)]) for item, _ in values])
            for _, name, (objects, values) in writer.write_buckets or ()
        ]
        if metadata is not None:
            vars(metadata).pop("all_local_plans", None)  # core's own way to keep a plan: not ours
        self._plan = _Plan(_described(tensors), files, metadata)

    def writer(
        self, folder: Path, values: Sequence[Tensor | None]
    ) -> tuple[Writer, Metadata | None]:
        """Return a writer of these values of the tensors, and what describes the whole."""
        assert self._plan is not None, "it fits"
        writer = Writer(str(folder))
        writer.write_buckets = [
            (str(folder / file.name), file.name, (file.objects, _compact(file.items, values)))
            for file in self._plan.files
        ]
        return writer, self._plan.metadata


@dataclass(frozen=True)
class _PlannedFile:
    """What one file of this process holds."""

    name: str
    objects: list[Any]  # with their bytes
    items: list[tuple[WriteItem, int]]  # with the number of the tensor in the list


@dataclass(frozen=True)
class _Plan:
    """Where everything goes, and the tensors that it is for."""

    described: list[Any]
    files: list[_PlannedFile]
    metadata: Metadata | None  # of the whole checkpoint; on the first process


def _weights(found: Sequence[Shard], state: Sequence[StatePart]) -> Iterator[ShardedTensor]:
    """Yield the weights; those in FP8 as what they are quantized from, their masters in bfloat16.

    Each process has them of the masters that it keeps. So a checkpoint is that of a run that keeps
    its weights in bfloat16.
    """
    in_fp8 = set()
    for shard in found:
        if shard.stand_in is None:
            yield shard.weight
        else:
            in_fp8.add(shard.weight.key)
    for part in state:
        if part.kind == MASTER and part.weight_key in in_fp8:
            values = part.tensor.data.to(torch.bfloat16)
            yield replace(part.tensor, key=part.weight_key, data=values, dtype=values.dtype)


def _key_of(item: WriteItem) -> tuple[str, tuple[int, ...]]:
    return item.index.fqn, tuple(item.index.offset or ())


def _compact(
    items: Sequence[tuple[WriteItem, int]], values: Sequence[Tensor | None]
) -> Iterator[tuple[WriteItem, Tensor]]:
    """Yield what is written one by one, since torch saves the whole memory that a view is of."""
    for item, number in items:
        tensor = values[number]
        assert tensor is not None, f"{item.index.fqn} is written by another process"
        assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
        tensor = tensor.view(item.tensor_data.chunk.sizes)
        whole = tensor.untyped_storage().size() == tensor.nbytes
        yield item, tensor if whole else tensor.clone()


def _described(tensors: Sequence[ShardedTensor]) -> list[Any]:
    """Return all that a plan depends on."""
    return [
        (
            tensor.key,
            tensor.dtype,
            tensor.local_shape,
            tensor.global_shape,
            tensor.global_offset,
            tensor.axis_fragmentations,
            tensor.prepend_axis_num,
            tensor.replica_id,
        )
        for tensor in tensors
    ]


def _memory(content: Content) -> list[_Address] | None:
    """Return where weights, buffers and optimizer state lie; None where any is made up anew."""
    addresses: list[_Address] = []
    for held in content.networks:
        found = _memory_of(held.chunks, held.optimizer)
        if found is None:
            return None
        addresses += found
    return addresses


def _memory_of(chunks: list[Any], optimizer: Any) -> list[_Address] | None:
    kept = kept_tensors(optimizer)
    if kept is None or any(is_in_fp8(one) for chunk in chunks for one in bare(chunk).parameters()):
        return None
    found = list(kept)
    for chunk in chunks:
        found += bare(chunk).buffers()
        if data_parallel.is_fsdp(chunk):
            found += [
                one
                for part in data_parallel.fsdp_parts(chunk)
                for one in (part.weights, part.updated)
            ]
        else:
            found += bare(chunk).parameters()
    return [_address(tensor) for tensor in found]


def _address(tensor: Tensor) -> _Address:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.data_ptr(), local.shape, local.dtype


@dataclass
class WrittenPart:
    """What came of the part of one process."""

    results: bytes = b""  # torch's description of what was written, pickled beside training
    sums: dict[str, layout.Sum] = field(default_factory=dict)  # of the files, by name
    failure: str = ""
    errno: int | None = None  # of the operating system, if the failure came from there


class Writing:
    """A checkpoint that a thread of this process writes, with those of the other processes.

    Args:
        folder: where to.
        writer: torch's writer, with what this process writes.
        metadata: of the whole checkpoint; on the first process.
    """

    def __init__(self, folder: Path, writer: Writer, metadata: Metadata | None) -> None:
        self._folder, self._writer, self._metadata = folder, writer, metadata
        self._results = b""
        self._sums: dict[str, layout.Sum] = {}
        self.sums: dict[str, layout.Sum] = {}  # of all processes, once described
        self._thread = InThread(self._write)

    def _write(self) -> None:
        """Write what is in host memory already: a thread has its own current CUDA device."""
        results: list[Any] = []
        for number, bucket in enumerate(self._writer.write_buckets or ()):
            _, outcome = self._writer.write_preloaded_data(
                [self._writer.transforms], number, bucket, None, None, use_fsync=True
            )
            if isinstance(outcome, Exception):
                raise outcome
            results += outcome
            self._sums[bucket[1]] = layout.sum_of_file(self._folder / bucket[1])
        self._writer.write_buckets = None  # and with it the copy in host memory
        self._results = pickle.dumps(results)

    @property
    def is_done(self) -> bool:
        """Whether this process has written its part."""
        return self._thread.is_done

    def wait(self) -> None:
        """Wait for this process alone."""
        self._thread.wait()

    def collect(self) -> list[WrittenPart]:
        """Wait for all processes; return on the first what they wrote; every process calls this.

        Raises:
            OSError: on the first process, with its number, if the system of any refused to write.
            RuntimeError: on the first process, if anything else failed.
            UserError: on the others, with the same words.
        """
        self.wait()
        error = self._thread.failure
        part = WrittenPart(self._results, self._sums)
        if error is not None:
            part = WrittenPart(failure=f"{type(error).__name__}: {error}", errno=_errno(error))
        parts: list[Any] | None = [None] * dist.get_world_size() if ranks.is_main() else None
        dist.gather_object(part, parts)
        ranks.run_on_main_first(lambda: _require_all(parts or []))
        return parts or []

    def describe(self, parts: list[WrittenPart]) -> None:
        """Write the description of the whole; the first process does, in whichever thread."""
        assert self._metadata is not None, "the first process has it"
        results = [pickle.loads(part.results) for part in parts]
        self._writer.finish(self._metadata, results)
        mark_as_megatrons(self._folder)
        self.sums = {name: one for part in parts for name, one in part.sums.items()}


class InThread:
    """Work that a thread of this process does.

    Args:
        work: what it does.
        is_left: whether an end of the program does not wait for it.
    """

    def __init__(self, work: Callable[[], None], *, is_left: bool = False) -> None:
        self.failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._do, args=(work,), name="checkpoint", daemon=is_left
        )
        self._thread.start()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised by `result`
            self.failure = error
            _let_go(error)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for its end, or so long at most."""
        self._thread.join(timeout_s)

    def result(self) -> None:
        """Wait for its end; raise what it raised."""
        self.wait()
        if self.failure is not None:
            raise self.failure


def _require_all(parts: list[WrittenPart]) -> None:
    failed = [(rank, part) for rank, part in enumerate(parts) if part.failure]
    if failed:
        words = ", ".join(f"{part.failure} (rank {rank})" for rank, part in failed)
        numbers = [part.errno for _, part in failed if part.errno is not None]
        raise OSError(numbers[0], words) if numbers else RuntimeError(words)


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
