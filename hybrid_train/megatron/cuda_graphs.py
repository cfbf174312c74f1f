"""CUDA graphs of layers: core's capture by Transformer Engine, called once behind the warm-up.

Core (0.19.2, transformer/cuda_graphs.py, TECudaGraphHelper) has no caller of its own; the training
loop is to make the calls below, in this order. They have never run: no GPU was at hand.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.utils import get_model_config

from hybrid_train.megatron.data_parallel import Chunks, ProcessGroups
from hybrid_train.megatron.optimizers import MegatronOptimizer
from hybrid_train.megatron.router import BalanceLosses


def captures_layers(chunks: Chunks) -> bool:
    """Tell whether the layers of a network are to be captured."""
    return bool(get_model_config(chunks[0]).cuda_graph_impl == "transformer_engine")


def capture_layers(
    chunks: Chunks,
    optimizer: MegatronOptimizer,
    groups: ProcessGroups,
    balance_losses: BalanceLosses,
    *,
    shape: tuple[int, int],
    global_batch: int,
) -> None:
    """Capture the graphable parts of all layers; from the next step on they are replayed.

    Args:
        chunks: the model chunks of this process.
        optimizer: theirs; its gradients are emptied by the capture.
        groups: the processes of the layout.
        balance_losses: the record of the routers, which a replay adds to without Python.
        shape: sequences and tokens per sequence of a microbatch, [B, S].
        global_batch: sequences of a step over all ranks.
    """
    balance_losses.stay_in_place(_device())
    config = get_model_config(chunks[0])
    _tell_microbatches(groups, shape[0], global_batch)
    hooked = [chunk for chunk in chunks if _gathers_in_hooks(chunk)]
    for chunk in hooked:  # Python that a replay would not run
        chunk.disable_forward_pre_hook(param_sync=False)
    helper = TECudaGraphHelper(
        model=chunks,
        config=config,
        seq_length=shape[1],
        micro_batch_size=shape[0],
        optimizers=[optimizer],
        pg_collection=groups,
    )
    helper.create_cudagraphs()
    for chunk in hooked:
        chunk.enable_forward_pre_hook()
    if hooked:
        helper.cuda_graph_set_manual_hooks()


def _tell_microbatches(groups: ProcessGroups, microbatch: int, global_batch: int) -> None:
    """Give core's global calculator the number that the helper asks it for."""
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        rank=dist.get_rank(),
        rampup_batch_size=None,
        global_batch_size=global_batch,
        micro_batch_size=microbatch,
        data_parallel_size=groups.dp.size(),
    )


def _gathers_in_hooks(chunk: Any) -> bool:
    settings = chunk.ddp_config
    return bool(settings.overlap_param_gather and settings.use_distributed_optimizer)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
