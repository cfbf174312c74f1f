"""The plan of a save, kept for the next save of the same run.

A plan says under which name, and where in which file, each of some thousand tensors is written; to
make one takes several times as long as to copy the tensors. It is used again as long as all
processes find what it was made for: tensors of the same names, sizes and places.

Which tensors there are is found out again, too, only when weights or optimizer state lie elsewhere
in memory. What a plan was made for stays alive with it, so that its memory is nobody else's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from hybrid_train.checkpoint.content import Content
from hybrid_train.checkpoint.optimizer_state import MASTER, StatePart, kept_tensors, state_parts
from hybrid_train.checkpoint.places import Place, bare, places
from hybrid_train.megatron import fsdp
from hybrid_train.megatron.checkpoints import Writer
from hybrid_train.megatron.sharded import ShardedTensor, is_main_replica
from hybrid_train.megatron.stand_ins import is_in_fp8

_Address = tuple[int, torch.Size, torch.dtype]


@dataclass(frozen=True)
class _File:
    """What one file of this process holds."""

    name: str
    objects: list[Any]  # with their bytes
    items: list[tuple[WriteItem, int]]  # with the number of the tensor in the list


@dataclass(frozen=True)
class _Plan:
    """Where everything goes, and the tensors that it is for."""

    described: list[Any]
    files: list[_File]
    metadata: Metadata | None  # of the whole checkpoint; on the first process


class KeptPlan:
    """What a run keeps from one save to the next."""

    def __init__(self) -> None:
        self._memory: list[_Address] | None = None
        self._tensors: list[ShardedTensor] = []
        self._plan: _Plan | None = None

    def tensors(self, content: Content) -> list[ShardedTensor]:
        """List weights and optimizer state of this process, in their own memory."""
        if self._memory is None or self._memory != _memory(content):
            self._tensors = []
            for held in content.networks:
                found = places(held.chunks, held.groups, network=held.name)
                state = state_parts(held.optimizer, found)
                self._tensors += [*_weights(found, state), *(part.tensor for part in state)]
            self._memory = _memory(content)
        return self._tensors

    def fits(self, tensors: Sequence[ShardedTensor]) -> bool:
        """Tell whether all processes can use the plan; every process calls this."""
        here = self._plan is not None and self._plan.described == _described(tensors)
        everywhere = torch.tensor(int(here), device=torch.cuda.current_device())
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        return bool(everywhere.item())

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
            _File(name, objects, [(item, numbers[_place(item)]) for item, _ in values])
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


def _weights(found: Sequence[Place], state: Sequence[StatePart]) -> Iterator[ShardedTensor]:
    """Yield the weights; those in FP8 as what they are quantized from, their masters in bfloat16.

    Each process has them of the masters that it keeps. So a checkpoint is that of a run that keeps
    its weights in bfloat16.
    """
    in_fp8 = set()
    for place in found:
        if place.stand_in is None:
            yield place.weight
        else:
            in_fp8.add(place.weight.key)
    for part in state:
        if part.kind == MASTER and part.weight_key in in_fp8:
            values = part.tensor.data.to(torch.bfloat16)
            yield replace(part.tensor, key=part.weight_key, data=values, dtype=values.dtype)


def _place(item: WriteItem) -> tuple[str, tuple[int, ...]]:
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
        if fsdp.is_split(chunk):
            found += [one for part in fsdp.parts(chunk) for one in (part.weights, part.updated)]
        else:
            found += bare(chunk).parameters()
    return [_address(tensor) for tensor in found]


def _address(tensor: Tensor) -> _Address:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.data_ptr(), local.shape, local.dtype
