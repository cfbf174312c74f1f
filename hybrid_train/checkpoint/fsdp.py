"""What each rank of a run under Megatron-FSDP holds, as boxes of the tensors of the whole model.

A rank keeps a range of each flattened weight, as the distributed optimizer does of its state. The
modules hold the whole weights, but only by name and shape: their memory is there while a layer
runs. So places are asked of the whole weights, and filled from the ranges.

Core 0.19.2 has a format of its own for this, "fsdp_dtensor". It is not used: it knows layers by
their number in the stage (Megatron-LM#7452, finding 12), and no other layout reads it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from torch import Tensor

from hybrid_train.model.stand_ins import empty_like, stand_ins


@dataclass(frozen=True)
class Part:
    """The range of one weight that this rank keeps."""

    parameter: Tensor  # the whole weight; its memory may be absent
    start: int  # first element of the range
    weights: Tensor  # flat, as the forward pass takes them
    updated: Tensor  # flat, as the optimizer moves them: the same, or masters in float32


def is_split(chunk: Any) -> bool:
    """Tell whether a model chunk is split by Megatron-FSDP."""
    return isinstance(chunk, FullyShardedDataParallel)


def parts(chunk: FullyShardedDataParallel) -> Iterator[Part]:
    """Yield the range of each weight of the chunk that this rank keeps, if it has any."""
    buffer = chunk.param_and_grad_buffer
    for _, optimized in buffer.optimizer_named_parameters:
        parameter = optimized.orig_param
        group = buffer.parameter_groups[buffer.param_to_param_group[parameter]]
        weights = group.model_weight_buffer
        item = weights.param_idx[parameter]
        if weights.get_item(item, only_shard=True).numel():
            start, _ = weights._get_item_slice_in_shard(item)
            yield Part(
                parameter,
                start,
                weights.get_item(item, only_shard=True),
                optimized.data.to_local().view(-1),
            )


@contextlib.contextmanager
def whole_weights(chunk: FullyShardedDataParallel) -> Iterator[dict[int, Tensor]]:
    """Let the modules hold tensors without memory in place of their parameters.

    Yields:
        The parameter of each stand-in, by its id.
    """
    core = chunk.module
    # Else the first call of state_dict would put distributed tensors back (megatron_fsdp.py 1146).
    was_split, core.is_param_fsdp_distributed = core.is_param_fsdp_distributed, True
    try:
        with stand_ins(core.module, _without_memory, weight=_original) as pairs:
            yield {id(stand_in): parameter for parameter, stand_in in pairs}
    finally:
        core.is_param_fsdp_distributed = was_split


def _original(parameter: Tensor) -> Tensor:
    """Return the whole weight of a parameter that may be distributed."""
    whole: Tensor = getattr(parameter, "orig_param", parameter)
    return whole


def _without_memory(parameter: Tensor) -> Tensor:
    return empty_like(parameter, "meta")
