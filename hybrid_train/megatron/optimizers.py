"""Megatron's optimizers: built from our section, with what core leaves undone in them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybrid_train.megatron import patches
from hybrid_train.megatron.checkpoints import is_in_fp8
from hybrid_train.megatron.offloaded_optimizer import OffloadedAdamW
from hybrid_train.optim.groups import PATTERNS
from hybrid_train.schema.optimizer import AdamW
from hybrid_train.schema.parallel import Parallel

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.uint8,  # as Transformer Engine calls it
}


def build_optimizer(
    adamw: AdamW,
    parallel: Parallel,
    chunks: list[Any],
    dtype: torch.dtype,
    on_bad_norm: Callable[[float], None],
) -> MegatronOptimizer:
    """Build AdamW over wrapped model chunks, its state split over data-parallel ranks if asked.

    Args:
        adamw: coefficients; the learning rate is set before every step.
        parallel: whether and how the state is split.
        chunks: model chunks wrapped for data parallelism.
        dtype: of the parameters.
        on_bad_norm: called with a gradient norm that is not finite, before anything changes.
    """
    with patches.fused_adam(bool(adamw.reduced_state) and not torch.cuda.is_available()):
        config = _config(adamw, parallel, dtype)
        optimizer = get_megatron_optimizer(
            config, chunks, _decay_rule(adamw), use_gloo_process_groups=False
        )
    if not isinstance(optimizer, ChainedOptimizer):  # of a single chunk under Megatron-FSDP
        optimizer = ChainedOptimizer([optimizer])
    if parallel.fsdp:
        _let_masters_be_reloaded(optimizer, chunks)
    if adamw.reduced_state:
        _let_masters_begin_with_weights(optimizer, dtype)
    if any(is_in_fp8(weight) for chunk in chunks for weight in chunk.parameters()):
        _let_masters_begin_with_loaded_values(optimizer, chunks)
    for group in optimizer.param_groups:
        # Core leaves this to its own scheduler, which we do not use.
        group["weight_decay"] = adamw.weight_decay * group["wd_mult"]
    _begin_state(optimizer)
    patches.fuse_clipping()
    _watch_norm(optimizer, on_bad_norm)
    return optimizer


def _config(adamw: AdamW, parallel: Parallel, dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        weight_decay=adamw.weight_decay,
        adam_beta1=adamw.beta1,
        adam_beta2=adamw.beta2,
        adam_eps=adamw.eps,
        clip_grad=adamw.clip_grad_norm,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather or parallel.fsdp,
        # Core's optimizer in host memory takes gradients and gives weights as FusedAdam with
        # reduced-precision state does.
        use_precision_aware_optimizer=bool(adamw.reduced_state or adamw.offload_share),
        main_grads_dtype=_DTYPES[adamw.main_gradients.value],
        main_params_dtype=_DTYPES[adamw.master_weights.value],
        exp_avg_dtype=_DTYPES[adamw.first_moment.value],
        exp_avg_sq_dtype=_DTYPES[adamw.second_moment.value],
        optimizer_cpu_offload=adamw.offload_share > 0,
        optimizer_offload_fraction=adamw.offload_share,
        overlap_cpu_optimizer_d2h_h2d=True,
        pin_cpu_grads=torch.cuda.is_available(),
        pin_cpu_params=torch.cuda.is_available(),
    )


def _decay_rule(adamw: AdamW) -> dict[ParamKey, ParamGroupOverride]:
    """Say which parameters do not decay; core's own rule, by the number of axes, is off then."""
    names = tuple(pattern for kind in adamw.no_decay for pattern in PATTERNS[kind])
    return {ParamKey(name=names): ParamGroupOverride(wd_mult=0.0)} if names else {}


def _begin_state(optimizer: MegatronOptimizer) -> None:
    """Let moments begin here where core would begin them with the first step, or not at all.

    A checkpoint is loaded before that step.
    """
    for part in working_parts(optimizer):
        for inner in torch_optimizers(part):
            if isinstance(inner, torch.optim.AdamW):
                _use_fused_kernel(inner)
            elif _is_offloaded(part):  # Transformer Engine's, of what stays on the GPU
                for group in inner.param_groups:
                    for parameter in group["params"]:
                        inner.initialize_state(parameter, False)
        if _is_offloaded(part):
            part.optimizer._sync_sub_optimizers_state_to_hdo()


def _use_fused_kernel(inner: torch.optim.AdamW) -> None:
    """Take torch's one-kernel AdamW; by default it loops over the parameters on a CPU."""
    for group in inner.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _let_masters_begin_with_weights(optimizer: ChainedOptimizer, dtype: torch.dtype) -> None:
    """Do what core leaves undone where FusedAdam keeps the masters (distrib_optimizer.py 3086)."""

    def reload(state_dict: Any = None) -> None:
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                part.optimizer.state.clear()  # begins anew, from the weights, with the next step

    optimizer.reload_model_params = reload
    if dtype == torch.float32:  # else it keeps a master of each weight, which nothing reads
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                part.optimizer.master_weights = False


def _let_masters_be_reloaded(optimizer: ChainedOptimizer, chunks: list[Any]) -> None:
    """Do what core leaves undone under Megatron-FSDP (distrib_optimizer.py 3079)."""

    def reload(state_dict: Any = None) -> None:
        for chunk in chunks:
            for group in chunk.param_and_grad_buffer.parameter_groups:
                if group.main_weight_buffer is not None:  # both are cut alike
                    group.main_weight_buffer.data.copy_(group.model_weight_buffer.data)

    optimizer.reload_model_params = reload


def _let_masters_begin_with_loaded_values(optimizer: ChainedOptimizer, chunks: list[Any]) -> None:
    """Give masters of weights in FP8 what was loaded for those, not what it was rounded to.

    Core takes the rounded values, unless it gets a state dict of names of its own
    (distrib_optimizer.py 3110).
    """
    reload_all = optimizer.reload_model_params

    def reload(state_dict: Any = None) -> None:
        reload_all(state_dict)
        loaded = {
            weight: vars(weight).pop("loaded_values")
            for chunk in chunks
            for weight in chunk.parameters()
            if "loaded_values" in vars(weight)
        }
        for part, weight, master in _masters(optimizer):
            if weight in loaded:
                own = part._get_model_param_range_map(weight)["param"]
                master.data.copy_(loaded[weight].view(-1)[own.start : own.end])

    optimizer.reload_model_params = reload


def _masters(optimizer: ChainedOptimizer) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield each weight that is no master itself, its master, and the optimizer that has them."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        groups = zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
        for weights, masters in groups:
            for weight, master in zip(weights, masters, strict=True):
                yield part, weight, master


def _watch_norm(optimizer: MegatronOptimizer, on_bad_norm: Callable[[float], None]) -> None:
    norm_of = optimizer.get_grad_norm

    def checked() -> float:
        norm = norm_of()
        if not math.isfinite(norm):
            on_bad_norm(float(norm))
        return norm

    optimizer.get_grad_norm = checked


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Set the rate of the next step for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)


def working_parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """Yield the chained optimizers that have parameters; a stage may lack those of a kind."""
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            yield part


def torch_optimizers(part: Any) -> Iterator[Any]:
    """Yield those of torch's kind that keep the state of a chained optimizer.

    Several where a share is offloaded: `part.optimizer` then hands them gradients and rates.
    """
    if _is_offloaded(part):
        yield from part.optimizer.sub_optimizers
    else:
        yield part.optimizer


def _is_offloaded(part: Any) -> bool:
    return isinstance(part.optimizer, OffloadedAdamW)


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Tell whether state is split over data-parallel ranks."""
    return any(is_distributed_part(part) for part in optimizer.chained_optimizers)


def is_distributed_part(part: Any) -> bool:
    """Tell whether the state of a chained optimizer is split over data-parallel ranks."""
    return isinstance(part, DistributedOptimizer)


def keeps_reduced_precision(part: Any) -> bool:
    """Tell whether FusedAdam keeps the state of a chained optimizer in reduced precision."""
    return bool(part.config.use_precision_aware_optimizer) and not _is_offloaded(part)


def state_of_updated(part: Any, updated: Tensor) -> dict[str, Tensor]:
    """Return the moments of weights that a chained optimizer updates, by their names in torch."""
    owner = part.optimizer
    key = owner.inner_param_to_orig_param[updated] if _is_offloaded(part) else updated
    state: dict[str, Tensor] = owner.state[key]
    return state


def reload_float32(part: Any, updated: Tensor) -> Callable[[], None] | None:
    """Return what takes a loaded float32 weight into its copy in host memory; None: it has none."""
    if not _is_offloaded(part):
        return None
    weight = part.optimizer.inner_param_to_orig_param[updated]
    if weight is updated or weight.dtype != torch.float32:
        return None

    def reload() -> None:
        updated.copy_(weight.detach())

    return reload


def updated_by(part: Any) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield each parameter, its first element that is updated here, and the updated weights."""
    if is_distributed_part(part) and part.ddp_config.use_megatron_fsdp:
        for parameter in part.get_parameters():
            if own_part(parameter).numel():
                yield parameter.orig_param, parameter.megatron_fsdp_slice.start, parameter
    elif is_distributed_part(part):
        given = keeps_reduced_precision(part) or _is_offloaded(part)
        halves = part.shard_float16_groups if given else None
        ours = [
            *_pairs(part.model_fp32_groups, part.shard_fp32_groups),
            *_pairs(part.model_float16_groups, halves or part.shard_fp32_from_float16_groups),
        ]
        for parameter, master in ours:
            start = part._get_model_param_range_map(parameter)["param"].start
            inner = part.optimizer.param_to_inner_param[master] if _is_offloaded(part) else master
            yield parameter, start, inner
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for parameter, master in _pairs(part.float16_groups, part.fp32_from_float16_groups):
            yield parameter, 0, master
        for parameter, _ in _pairs(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups):
            yield parameter, 0, parameter
    else:
        assert isinstance(part, FP32Optimizer), type(part)
        for parameter in part.get_parameters():
            yield parameter, 0, parameter


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be distributed."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def _pairs(ones: list[list[Tensor]], others: list[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for group, other in zip(ones, others, strict=True):
        yield from zip(group, other, strict=True)


def padding_of_range(part: Any) -> Iterator[tuple[torch.dtype, int]]:
    """Yield of each buffer its format, and how much of the range of this process is padding.

    A chained optimizer that is not split over data-parallel ranks has no range.
    """
    if not is_distributed_part(part):
        return
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        own = sum(
            one["param"].size
            for buckets in ranges.values()
            for bucket in buckets
            for one in bucket["param_map"].values()
        )
        yield buffer.param_dtype, buffer.numel // buffer.data_parallel_world_size - own
