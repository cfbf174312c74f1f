"""What a checkpoint holds of a run, and which part of the whole model each tensor here is.

The distributed optimizer gives each rank a range of a flattened parameter, which begins and ends
anywhere; a checkpoint names a part of a tensor by offset and size along each axis. So a range is
cut into chunks, rectangular parts whose elements lie one after the other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hybrid_train.megatron import data_parallel
from hybrid_train.megatron.checkpoints import (
    ShardedTensor,
    plain_weights,
    sharded_entries,
    tensors_of_entry,
)
from hybrid_train.megatron.data_parallel import ProcessGroups
from hybrid_train.megatron.optimizers import MegatronOptimizer


@dataclass(frozen=True)
class HeldNetwork:
    """A network as a checkpoint holds it.

    Attributes:
        chunks: model chunks of this process, wrapped for data parallelism.
        optimizer: over them.
        groups: the processes that hold the other parts.
        name: stands in front of all its keys; empty where it is the only one.
    """

    chunks: list[Any]
    optimizer: MegatronOptimizer
    groups: ProcessGroups
    name: str = ""


@dataclass(frozen=True)
class Content:
    """All that a checkpoint holds beside random states; the networks are on one layout."""

    networks: tuple[HeldNetwork, ...]


@dataclass(frozen=True)
class Shard:
    """A range of one tensor of this process, and where it belongs in the whole model."""

    owner: Tensor  # parameter or buffer
    start: int  # first element of the range, counted in the flat owner
    weight: ShardedTensor  # shares the memory of the owner, or of what stands for it
    stand_in: Tensor | None = None  # of an owner in FP8: plain, empty


def shards_of(
    chunks: list[Any],
    groups: ProcessGroups,
    *,
    to_load: bool = False,
    network: str = "",
) -> list[Shard]:
    """List the parameters and persistent buffers of the model chunks of this process.

    Names are those of the whole model: layers are numbered through all stages. In front of them
    stands that of the network, in a checkpoint that holds several: "NETWORK/". A tensor that packs
    several (the projections and convolutions of Mamba) has a shard for each. Of a weight that
    Megatron-FSDP has split there are shards for the elements that this process keeps. A weight in
    FP8 cannot be cut so: its shards are those of a plain tensor, which has memory only if it is to
    take what is loaded (`quantize_loaded`).
    """
    found: list[Shard] = []
    for chunk in chunks:
        of_chunk = (
            _kept(chunk, groups) if data_parallel.is_fsdp(chunk) else _whole(chunk, groups, to_load)
        )
        found += of_chunk
    if not network:
        return found
    return [
        replace(one, weight=replace(one.weight, key=f"{network}/{one.weight.key}")) for one in found
    ]


def _whole(chunk: Any, groups: ProcessGroups, to_load: bool) -> Iterator[Shard]:
    metadata = {"dp_cp_group": groups.dp_cp}
    with plain_weights(bare(chunk), without_memory=not to_load) as pairs:
        in_fp8 = {id(stand_in): weight for weight, stand_in in pairs}
        sharded = sharded_entries(bare(chunk), metadata)
    for whole in sharded.values():
        held = whole.data
        for part in tensors_of_entry(whole):
            assert part.data.is_contiguous(), f"{part.key} is no range of its tensor"
            start = part.data.storage_offset() - held.storage_offset()
            if id(held) in in_fp8:
                yield Shard(in_fp8[id(held)], start, part, held)
            else:
                yield Shard(held, start, part)


def _kept(chunk: Any, groups: ProcessGroups) -> Iterator[Shard]:
    """Cut the shards of split weights down to what this process keeps; buffers are whole."""
    kept = {id(part.parameter): part for part in data_parallel.fsdp_parts(chunk)}
    with data_parallel.whole_weights(chunk) as parameters:
        whole = list(_whole(chunk, groups, to_load=False))
    for shard in whole:
        parameter = parameters.get(id(shard.owner))
        if parameter is None:
            yield shard
        elif id(parameter) in kept:
            part = kept[id(parameter)]
            yield from _cut(replace(shard, owner=parameter), part.start, part.weights)


def _cut(shard: Shard, first: int, values: Tensor) -> Iterator[Shard]:
    """Cut what a shard has in common with a flat range of its owner into chunks."""
    shape = shard.weight.local_shape
    start = max(first, shard.start)
    stop = min(first + values.numel(), shard.start + math.prod(shape))
    for tensor_chunk in tensor_chunks(shape, start - shard.start, stop - shard.start):
        part = values[start - first :][: tensor_chunk.numel]
        tensor = chunk_of(shard.weight, shard.weight.key, part, tensor_chunk)
        yield Shard(shard.owner, start, only_copy(tensor))
        start += tensor_chunk.numel


def quantize_loaded(found: Sequence[Shard], *, masters_follow: bool = False) -> None:
    """Quantize what was loaded for weights in FP8.

    Args:
        found: all shards of a load that is over.
        masters_follow: whether masters are to begin with what was loaded, when the optimizer is
            told to reload them (`megatron/optimizers.py`): they take no values from FP8.
    """
    loaded = {id(one.owner): (one.owner, one.stand_in) for one in found if one.stand_in is not None}
    for owner, values in loaded.values():
        with torch.no_grad():
            owner.copy_(values)
        if masters_follow:
            owner.loaded_values = values  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TensorChunk:
    """A rectangular part of a tensor whose elements lie one after the other."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the chunk."""
        return math.prod(self.size)


def tensor_chunks(shape: Sequence[int], start: int, stop: int) -> Iterator[TensorChunk]:
    """Cut the elements [start, stop) of a row-major tensor of `shape` into chunks, in order.

    There are at most two for each axis but the first: the rest of a row, whole rows, the beginning
    of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield TensorChunk((), ())
        return
    if len(shape) == 1:
        yield TensorChunk((start,), (stop - start,))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are [first, last)
    if first > last:  # begins and ends inside one row
        yield from _inside(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _inside(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield TensorChunk((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * row < stop:
        yield from _inside(shape, last, 0, stop - last * row)


def _inside(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[TensorChunk]:
    for tensor_chunk in tensor_chunks(shape[1:], start, stop):
        yield TensorChunk((row, *tensor_chunk.offset), (1, *tensor_chunk.size))


def chunk_of(
    weight: ShardedTensor, key: str, values: Tensor, tensor_chunk: TensorChunk
) -> ShardedTensor:
    """Give values the place of a chunk of a weight in the whole model."""
    numbered = weight.prepend_axis_num  # leading axes that only number experts
    size = (1,) * numbered + tensor_chunk.size
    offset = (0,) * numbered + tensor_chunk.offset
    return replace(
        weight,
        key=key,
        data=values.detach().view(size),
        dtype=values.dtype,
        local_shape=size,
        global_offset=tuple(a + b for a, b in zip(weight.global_offset, offset, strict=True)),
        axis_fragmentations=None,  # chunks make no regular grid
        prepend_axis_num=0,
    )


def only_copy(tensor: ShardedTensor) -> ShardedTensor:
    """Say that no other data-parallel rank has this tensor: the third number is the data rank."""
    return replace(tensor, replica_id=(*tensor.replica_id[:2], 0))


def bare(chunk: Any) -> Any:
    """Return the model inside its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


class StoredChunk(Protocol):
    """A chunk of a tensor, as torch's checkpoints describe it."""

    @property
    def offsets(self) -> Sequence[int]: ...

    @property
    def sizes(self) -> Sequence[int]: ...


def is_partition(shape: Sequence[int], chunks: Sequence[StoredChunk]) -> bool:
    """Tell whether chunks cover a tensor of `shape` and none covers an element of another.

    Only chunks that share a row of the first axis are compared with each other.
    """
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        return False
    beside: list[StoredChunk] = []  # those before that reach into the row of the next
    for chunk in sorted(chunks, key=lambda one: tuple(one.offsets)):
        if not _is_inside(shape, chunk):
            return False
        if shape:
            row = chunk.offsets[0]
            beside = [other for other in beside if other.offsets[0] + other.sizes[0] > row]
        if any(_share_elements(chunk, other) for other in beside):
            return False
        beside.append(chunk)
    return True


def _is_inside(shape: Sequence[int], chunk: StoredChunk) -> bool:
    axes = zip(chunk.offsets, chunk.sizes, shape, strict=True)
    return all(offset >= 0 and offset + size <= length for offset, size, length in axes)


def _share_elements(one: StoredChunk, other: StoredChunk) -> bool:
    axes = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in axes)
