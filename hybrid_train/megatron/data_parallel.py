"""Data parallelism: model chunks wrapped by Megatron, their gradient buffers and parameters."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from hybrid_train.megatron import fsdp, replacements
from hybrid_train.megatron.hybrid import FLOAT32
from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import Precision

Chunks = list[DistributedDataParallel]


def wrap(
    chunks: Sequence[Module], config: TransformerConfig, parallel: Parallel, precision: Precision
) -> Chunks:
    """Wrap the model chunks of this process, in the model's format, for data parallelism."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.reduce_gradients_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        fp8_param_gather=precision.fp8_param_gather,
    )
    # Megatron-FSDP frees and reuses memory of collectives by the order of CUDA streams, which the
    # threads of gloo do not keep: they would write into what is somebody else's by then.
    cpu.finish_collectives_at_once(parallel.fsdp or precision.fp8_param_gather)
    if not torch.cuda.is_available():
        replacements.gather_one_by_one(precision.fp8_param_gather)
    if parallel.fsdp:
        return fsdp.wrap(chunks, config, precision)
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return wrapped


def in_model_format(chunks: Sequence[Module], config: TransformerConfig) -> list[Module]:
    """Bring the model chunks of this process to bfloat16, where the model has it."""
    return [_in_half_precision(config, chunk) if config.bf16 else chunk for chunk in chunks]


def _in_half_precision(config: TransformerConfig, chunk: Module) -> Module:
    """Bring a chunk to bfloat16, but for what decides over decays and counts of tokens.

    Core makes A_log and D in float32 (mamba_mixer.py 394) and then turns them to bfloat16 with all
    else; counts of tokens stop at 256 there, as a sum that grows by ones (router.py 739).
    """
    precise = {
        name: tensor.detach().clone()
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers())
        if name.rpartition(".")[2] in FLOAT32
    }
    halved = Float16Module(config, chunk)
    for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
        if name in precise:
            tensor.data = precise[name]
    return halved


def zero_gradients(chunks: Chunks) -> None:
    """Empty the gradient buffers."""
    for chunk in chunks:
        chunk.zero_grad_buffer()


def complete_parameters(chunks: Chunks) -> None:
    """Gather the parameters that other data-parallel ranks have updated; every process calls this.

    With `overlap_param_gather` each rank has only its own updates until the next forward pass, so
    whoever reads the weights between two steps has to ask for the rest.
    """
    for chunk in chunks:
        # Under FSDP every rank keeps its own part, and whoever reads the weights takes the parts.
        if chunk.ddp_config.overlap_param_gather and not chunk.ddp_config.use_megatron_fsdp:
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)


def non_finite_gradients(chunks: Chunks) -> list[str]:
    """Name the parameters of this process whose gradient is not finite, in order of the model."""
    return [
        name
        for chunk in chunks
        for name, gradient in _gradients(chunk)
        if not torch.isfinite(gradient).all()
    ]


def _gradients(chunk: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what this process has of the gradient of each parameter."""
    if chunk.ddp_config.use_megatron_fsdp:
        yield from fsdp.gradients(chunk)
        return
    for name, parameter in chunk.module.named_parameters():
        if parameter.requires_grad:  # core gives a frozen one no buffer
            yield name, parameter.main_grad
