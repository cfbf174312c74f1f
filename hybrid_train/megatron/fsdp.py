"""Megatron-FSDP: weights, gradients and optimizer state in parts over data-parallel ranks.

A layer's weights are gathered while it runs and dropped behind it; its gradient is reduced as soon
as it is there. Between steps each rank has its own part of everything, and no more: a range of each
flattened weight, as the distributed optimizer has of its state. The modules hold the whole weights,
but only by name and shape. So places in a checkpoint are asked of the whole weights, and filled
from the ranges.

Core 0.19.2 has a format of its own for this, "fsdp_dtensor". It is not used: it knows layers by
their number in the stage (Megatron-LM#7452, finding 12), and no other layout reads it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from hybrid_train.megatron.stand_ins import empty_like, stand_ins
from hybrid_train.schema.precision import Precision


def wrap(
    chunks: Sequence[Module], config: TransformerConfig, precision: Precision
) -> list[FullyShardedDataParallel]:
    """Split the model chunks of this process, which hold everything until then."""
    reduced_in = torch.float32 if precision.reduce_gradients_in_fp32 else None
    settings = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy="optim_grads_params",
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        # Weights gathered ahead of the next step would be those from before a load.
        fsdp_all_gather_in_start_param_sync=False,
        grad_reduce_in_fp32=precision.reduce_gradients_in_fp32,
        megatron_fsdp_main_params_dtype=torch.float32 if config.bf16 else None,
        megatron_fsdp_main_grads_dtype=reduced_in,
        megatron_fsdp_grad_comm_dtype=reduced_in,
    )
    return [FullyShardedDataParallel(config, settings, chunk) for chunk in chunks]


def gradients(chunk: FullyShardedDataParallel) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's part of the reduced gradient of each parameter, in order of the model."""
    parts = dict(chunk.param_and_grad_buffer.optimizer_named_parameters)
    for name in chunk.module.raw_param:
        if parts[name].grad is not None:  # None where the rank's part is empty
            yield name.removeprefix("module."), parts[name].grad.to_local()


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
