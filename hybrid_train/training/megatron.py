"""Gateway to Megatron's training machinery: data parallelism, schedules, gradient finalisation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    param_and_grad_buffer,
)
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from hybrid_train.model.megatron import FLOAT32
from hybrid_train.runtime import cpu, progress
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import Precision
from hybrid_train.training import fsdp

Chunks = list[DistributedDataParallel]
_TOGETHER = param_and_grad_buffer._coalescing_manager


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
        # Gloo makes one tensor of what is gathered together, codes and bfloat16 weights alike: of
        # one type, which is wrong for the others.
        alone = precision.fp8_param_gather
        param_and_grad_buffer._coalescing_manager = cpu.one_by_one if alone else _TOGETHER
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


def run_schedule(
    chunks: Chunks,
    forward_step: Callable[..., Any],
    batches: list[Any],
    *,
    shape: tuple[int, int],
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """Run all microbatches of a step through Megatron's schedule for this layout.

    Args:
        chunks: the model chunks of this process.
        forward_step: (iterator of microbatches, chunk) -> (output, loss function).
        batches: the microbatches.
        shape: sequences and tokens per sequence of a microbatch, [B, S].
        forward_only: no gradients.

    Returns:
        What the loss function reported for each microbatch; empty but on the last pipeline stage.
    """
    iterators: list[Iterator[Any]] = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=forward_only,
    )


class Finalizer:
    """Megatron's reduction of gradients, which first notes how many tokens each expert got.

    The reduction updates the expert biases from these counts and then forgets them. Behind it the
    gradients are divided by `denominator`, a float, since core adds whole tokens only and takes no
    less than one of them (schedules.py 749, finalize_model_grads.py 693).
    """

    denominator: Tensor  # of the losses of the step, in all processes

    def __init__(self, config: TransformerConfig) -> None:
        self.expert_counts: dict[tuple[bool, int], Tensor] = {}  # (in MTP, layer from 1) -> counts
        self._biases: list[tuple[Tensor, Tensor]] = []  # of each router, and a copy from before
        config.finalize_model_grads_func = self

    def __call__(self, chunks: Chunks, tokens: Tensor | None, **kwargs: Any) -> None:
        """Take the place of `finalize_model_grads`; `tokens` are core's own count."""
        progress.enter(progress.REDUCE)  # from here on processes wait for each other
        self.expert_counts, self._biases = {}, []
        for module in _routers(chunks):  # MTP blocks of several depths share a place
            place = (module.is_mtp_layer, module.layer_number)
            counts = self.expert_counts.get(place, 0)
            self.expert_counts[place] = counts + module.local_tokens_per_expert
            self._biases.append((module.expert_bias, module.expert_bias.clone()))
        finalize_model_grads(chunks, None, **kwargs)
        for chunk in chunks:
            chunk.scale_gradients(1.0 / self.denominator)

    def restore_expert_biases(self) -> None:
        """Take back the update of the expert biases, of a step that turned out to be bad."""
        for bias, before in self._biases:
            bias.copy_(before)


def _routers(chunks: Chunks) -> Iterator[TopKRouter]:
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                yield module


def forget_loads(chunks: Chunks) -> None:
    """Forget the tokens of experts in passes that no reduction followed."""
    for module in _routers(chunks):
        module.local_tokens_per_expert.zero_()


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
