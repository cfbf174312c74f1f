"""Process groups, and models wrapped for data parallelism: DDP and Megatron-FSDP.

And whether processes still hold alike what they should: a bit that turns in the memory of one GPU,
or a kernel that computes wrongly once, raises no error; the copies of a weight drift apart, and the
loss says so long after. Each process sums up its weights, and groups compare the sums.

Under Megatron-FSDP a layer's weights are gathered while it runs and dropped behind it; its gradient
is reduced as soon as it is there. Between steps each rank has its own part of everything, and no
more: a range of each flattened weight, as the distributed optimizer has of its state. The modules
hold the whole weights, but only by name and shape. So places in a checkpoint are asked of the whole
weights, and filled from the ranges.

Core 0.19.2 has a checkpoint format of its own for this, "fsdp_dtensor". It is not used: it knows
layers by their number in the stage (Megatron-LM#7452, finding 12), and no other layout reads it.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection as ProcessGroups
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from hybrid_train.megatron import patches
from hybrid_train.megatron.checkpoints import empty_like, is_in_fp8, stand_ins
from hybrid_train.megatron.gpu_switches import group_options
from hybrid_train.megatron.hybrid import FLOAT32
from hybrid_train.runtime import cpu
from hybrid_train.schema.gpu import Gpu
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import Precision

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_BIAS = "expert_bias"  # the one buffer of weights that training changes
Chunks = list[DistributedDataParallel]  # of one process; under Megatron-FSDP its own class


def build_groups(parallel: Parallel, timeout_s: float, gpu: Gpu | None = None) -> ProcessGroups:
    """Split the processes of the run into groups along each parallel axis.

    Megatron's tracker of random states begins here, too. The one for inference never switches
    streams: the family has no dropout, and weights are initialised by name (`model/build.py`).

    Args:
        parallel: the degrees.
        timeout_s: of a collective.
        gpu: options of NCCL, where it is used.
    """
    on_gpu = torch.cuda.is_available()
    patches.for_process(on_gpu=on_gpu)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        **group_options(gpu or Gpu(), on_gpu=on_gpu),
    )
    return ProcessGroups.use_mpu_process_groups()


def destroy_groups() -> None:
    """Forget the groups, so that a later run in this process can build its own."""
    parallel_state.destroy_model_parallel()


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


def wrap(
    chunks: Sequence[Module],
    config: TransformerConfig,
    parallel: Parallel,
    precision: Precision,
    *,
    nccl_user_buffers: bool = False,
) -> Chunks:
    """Wrap the model chunks of this process, in the model's number format, for data parallelism."""
    registers = nccl_user_buffers and torch.cuda.is_available()
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.reduce_gradients_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        fp8_param_gather=precision.fp8_param_gather,
        bucket_size=parallel.bucket_parameters,
        nccl_ub=registers,
        # Gradients of experts come behind the ordinary ones; else they are taken before they are
        # there (distributed_data_parallel.py 365).
        delay_wgrad_compute=parallel.overlap_expert_gradients and torch.cuda.is_available(),
    )
    # Megatron-FSDP frees and reuses memory of collectives by the order of CUDA streams, which the
    # threads of gloo do not keep: they would write into what is somebody else's by then.
    cpu.finish_collectives_at_once(parallel.fsdp or precision.fp8_param_gather)
    if not torch.cuda.is_available():
        patches.gather_one_by_one(precision.fp8_param_gather)
    if parallel.fsdp:
        return _wrap_fsdp(chunks, config, precision)
    with _on_a_stream_to_capture(config):
        wrapped = [
            DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
    if parallel.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return wrapped


@contextlib.contextmanager
def _on_a_stream_to_capture(config: TransformerConfig) -> Iterator[None]:
    """Build beside the default stream what is to run in a captured step.

    The nodes of autograd that sum gradients run on the stream on which the wrapper makes them, and
    the default one cannot be captured.
    """
    if config.cuda_graph_impl != "full_iteration":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _wrap_fsdp(
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
        yield from _fsdp_gradients(chunk)
        return
    for name, parameter in chunk.module.named_parameters():
        if parameter.requires_grad:  # core gives a frozen one no buffer
            yield name, parameter.main_grad


def is_fsdp(chunk: Any) -> bool:
    """Tell whether a model chunk is split by Megatron-FSDP."""
    return isinstance(chunk, FullyShardedDataParallel)


def _fsdp_gradients(chunk: FullyShardedDataParallel) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's part of the reduced gradient of each parameter, in order of the model."""
    optimized = dict(chunk.param_and_grad_buffer.optimizer_named_parameters)
    for name in chunk.module.raw_param:
        if optimized[name].grad is not None:  # None where the rank's part is empty
            yield name.removeprefix("module."), optimized[name].grad.to_local()


@dataclass(frozen=True)
class FsdpPart:
    """The range of one weight that this rank keeps."""

    parameter: Tensor  # the whole weight; its memory may be absent
    start: int  # first element of the range
    weights: Tensor  # flat, as the forward pass takes them
    updated: Tensor  # flat, as the optimizer moves them: the same, or masters in float32


def fsdp_parts(chunk: FullyShardedDataParallel) -> Iterator[FsdpPart]:
    """Yield the range of each weight of the chunk that this rank keeps, if it has any."""
    buffer = chunk.param_and_grad_buffer
    for _, optimized in buffer.optimizer_named_parameters:
        parameter = optimized.orig_param
        group = buffer.parameter_groups[buffer.param_to_param_group[parameter]]
        weights = group.model_weight_buffer
        item = weights.param_idx[parameter]
        if weights.get_item(item, only_shard=True).numel():
            start, _ = weights._get_item_slice_in_shard(item)
            yield FsdpPart(
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


@dataclass(frozen=True)
class Difference:
    """A tensor that should be the same in all processes of a group, and is not.

    Attributes:
        name: of the tensor.
        ranks: of the run, whose copies are not those of most; all, where no copy is.
    """

    name: str
    ranks: tuple[int, ...]


def different_replicas(chunks: Chunks, groups: ProcessGroups) -> list[Difference]:
    """Compare all weights that other processes hold too; every process of the run calls this.

    Megatron-FSDP keeps no weight twice, and is refused. With `overlap_param_gather` each rank gets
    the weights of the others anew before it uses them, and so before they are compared: what one
    lost of those is mended by then; what tensor ranks share, and biases of experts, are not.

    Returns:
        The same list on all processes of a group; others may find other tensors, or none.
    """
    complete_parameters(chunks)
    found: list[Difference] = []
    for group, named in _by_group(chunks, groups):
        found += _compare(named, group)
    return found


@torch.no_grad()
def _by_group(
    chunks: Chunks, groups: ProcessGroups
) -> Iterator[tuple[Any, list[tuple[str, Tensor]]]]:
    """Yield groups of more than one process with the tensors that all of them hold alike."""
    of_group: dict[str, list[tuple[str, Tensor]]] = {"dp_cp": [], "expt_dp": [], "tp": []}
    for number, chunk in enumerate(chunks):
        prefix = f"chunk {number}: " if len(chunks) > 1 else ""
        for name, weight in chunk.module.named_parameters():
            is_expert = not getattr(weight, "allreduce", True)
            named = (prefix + name.removeprefix("module."), weight)
            of_group["expt_dp" if is_expert else "dp_cp"].append(named)
            if not is_expert and not getattr(weight, "tensor_model_parallel", False):
                of_group["tp"].append(named)
        for name, buffer in chunk.module.named_buffers():
            if name.endswith(_BIAS):
                named = (prefix + name.removeprefix("module."), buffer)
                of_group["dp_cp"].append(named)
                of_group["tp"].append(named)
    for name, tensors in of_group.items():
        group = getattr(groups, name)
        if group.size() > 1 and tensors:
            yield group, tensors


def _compare(named: Sequence[tuple[str, Tensor]], group: Any) -> list[Difference]:
    """Return what differs within a group; the sums of all members travel only if something does."""
    own = torch.stack([checksum(tensor) for _, tensor in named])
    least, most = own.clone(), own.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    wrong = (least != most).nonzero().flatten()
    if not len(wrong):
        return []
    sums = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(sums, own, group=group)
    ranks = dist.get_process_group_ranks(group)
    return [
        Difference(named[place][0], _unlike_most([int(one[place]) for one in sums], ranks))
        for place in wrong.tolist()
    ]


def _unlike_most(sums: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    (usual, count), *_ = Counter(sums).most_common()
    if 2 * count <= len(sums):
        return tuple(ranks)
    return tuple(rank for rank, one in zip(ranks, sums, strict=True) if one != usual)


def checksum(tensor: Tensor) -> Tensor:
    """Sum up the bits of a tensor: a whole number of 64 bits, [].

    Rows are summed as words and weighted with odd numbers modulo 2^64, so that each single turned
    bit changes the sum, and so do most exchanges of rows.
    """
    if is_in_fp8(tensor):
        tensor = tensor.dequantize()
    words = tensor.detach().contiguous().view(_WORDS[tensor.element_size()])
    rows = words.flatten(1).sum(dim=1, dtype=torch.int64) if words.dim() > 1 else words.long()
    weights = torch.arange(rows.numel(), device=rows.device, dtype=torch.int64) * 2 + 1
    return (rows.flatten() * weights).sum()
