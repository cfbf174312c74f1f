"""Gateway to Megatron-FSDP: weights, gradients and optimizer state in parts over data ranks.

A layer's weights are gathered while it runs and dropped behind it; its gradient is reduced as soon
as it is there. Between steps each rank has its own part of everything, and no more.
"""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from hybrid_train.runtime import cpu
from hybrid_train.schema.precision import Precision


def wrap(
    chunks: Sequence[Module], config: TransformerConfig, precision: Precision
) -> list[FullyShardedDataParallel]:
    """Split the model chunks of this process, which hold everything until then."""
    if not torch.cuda.is_available():
        param_and_grad_buffer._coalescing_manager = cpu.one_by_one
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
