"""Tensors of a process with their places in the whole model, whatever the layout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch import distributed as dist

from hybrid_train.checkpoint.shards import shards_of
from hybrid_train.megatron import data_parallel
from hybrid_train.megatron.checkpoints import sharded_tensors


@dataclass(frozen=True)
class Shard:
    """A part of one tensor of the whole model."""

    key: str  # name in a checkpoint, the same under every layout
    whole_shape: tuple[int, ...]
    place: tuple[int | slice, ...]  # whole[place] is this part
    value: Tensor


def weights(chunks: Sequence[Any]) -> Iterator[Shard]:
    """Yield every parameter and buffer that this process holds."""
    for chunk in chunks:
        yield from _kept(chunk) if data_parallel.is_fsdp(chunk) else _shards(chunk.module)


def gradients(chunks: Sequence[Any]) -> Iterator[Shard]:
    """Yield the reduced gradient of every parameter of this process."""
    for chunk in chunks:
        if data_parallel.is_fsdp(chunk):
            yield from _kept_gradients(chunk)
            continue
        _gather_gradients(chunk)
        trained = [one for one in chunk.module.parameters() if one.requires_grad]
        buffers = {one.main_grad.untyped_storage().data_ptr() for one in trained}
        held = [(one, one.data) for one in trained]
        try:
            # What knows where a weight belongs is asked about its gradient.
            for parameter, _ in held:
                parameter.data = parameter.main_grad
            for shard in _shards(chunk.module):
                if shard.value.untyped_storage().data_ptr() in buffers:
                    yield shard
        finally:
            for parameter, data in held:
                parameter.data = data


def assemble(shards: Iterator[Shard]) -> dict[str, Tensor]:
    """Put the shards of one process that holds everything into whole tensors."""
    whole: dict[str, Tensor] = {}
    for shard in shards:
        if shard.key not in whole:
            whole[shard.key] = torch.full(shard.whole_shape, torch.nan)
        whole[shard.key][shard.place] = shard.value
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def _shards(model: Any) -> Iterator[Shard]:
    for tensor in sharded_tensors(model):
        numbered = tensor.prepend_axis_num  # leading axes that number experts
        sizes = zip(tensor.global_offset[numbered:], tensor.data.shape, strict=True)
        place = (
            *tensor.global_offset[:numbered],
            *(slice(start, start + size) for start, size in sizes),
        )
        yield Shard(tensor.key, tuple(tensor.global_shape), place, tensor.data.detach())


def _kept(chunk: Any) -> Iterator[Shard]:
    """Yield what Megatron-FSDP leaves to this process: boxes of the whole tensors."""
    for shard in shards_of([chunk], ProcessGroupCollection.use_mpu_process_groups()):
        tensor = shard.weight
        numbered = tensor.prepend_axis_num
        size = (1,) * numbered + tuple(tensor.data.shape)
        axes = zip(tensor.global_offset, size, strict=True)
        cut = tuple(slice(start, start + length) for start, length in axes)
        yield Shard(tensor.key, tuple(tensor.global_shape), cut, tensor.data.detach().view(size))


def _kept_gradients(chunk: Any) -> Iterator[Shard]:
    """Yield the gradients in place of the weights, which are cut alike."""
    groups = chunk.param_and_grad_buffer.parameter_groups
    gradients = {group.main_grad_buffer.data.untyped_storage().data_ptr() for group in groups}
    held = [(group, group.model_weight_buffer.data) for group in groups]
    try:
        for group, _ in held:
            group.model_weight_buffer.data = group.main_grad_buffer.data
        for shard in _kept(chunk):
            if shard.value.untyped_storage().data_ptr() in gradients:
                yield shard
    finally:
        for group, data in held:
            group.model_weight_buffer.data = data


def _gather_gradients(chunk: Any) -> None:
    """Complete the gradients that the distributed optimizer leaves in parts over the ranks."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        size, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
        if size == 1:
            continue
        for bucket in buffer.buckets:
            part = bucket.grad_data.view(size, -1)[rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, part, group=buffer.data_parallel_group)
