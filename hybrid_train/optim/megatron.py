"""Gateway to Megatron's optimizers."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from megatron.core import optimizer as core
from megatron.core import utils
from megatron.core.optimizer import (
    OptimizerConfig,
    clip_grads,
    get_megatron_optimizer,
    optimizer_config,
)
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from hybrid_train.model.megatron import is_in_fp8
from hybrid_train.optim.fused_adam import FusedAdam
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
    with _fused_adam_on_a_cpu(bool(adamw.lowered)):
        config = _config(adamw, parallel, dtype)
        optimizer = get_megatron_optimizer(
            config, chunks, _decay_rule(adamw), use_gloo_process_groups=False
        )
    if not isinstance(optimizer, ChainedOptimizer):  # of a single chunk under Megatron-FSDP
        optimizer = ChainedOptimizer([optimizer])
    if parallel.fsdp:
        _let_masters_be_reloaded(optimizer, chunks)
    if adamw.lowered:
        _let_masters_begin_with_weights(optimizer, dtype)
    if any(is_in_fp8(weight) for chunk in chunks for weight in chunk.parameters()):
        _let_masters_begin_with_loaded_values(optimizer, chunks)
    for (
        group
    ) in optimizer.param_groups:  # core leaves this to its own scheduler, which we do not use
        group["weight_decay"] = adamw.weight_decay * group["wd_mult"]
    _use_fused_kernel(optimizer)
    _use_fused_clipping()
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
        use_precision_aware_optimizer=bool(adamw.lowered),
        main_grads_dtype=_DTYPES[adamw.main_gradients.value],
        main_params_dtype=_DTYPES[adamw.master_weights.value],
        exp_avg_dtype=_DTYPES[adamw.first_moment.value],
        exp_avg_sq_dtype=_DTYPES[adamw.second_moment.value],
    )


@contextlib.contextmanager
def _fused_adam_on_a_cpu(lowered: bool) -> Iterator[None]:
    """Let core find our FusedAdam where it looks for Transformer Engine's, while it builds.

    Only where state is lowered, and there is no GPU. It asks for the class by name, and for its
    version (core 0.19.2, optimizer_config.py 437 and optimizer/__init__.py 583).
    """
    if not lowered or torch.cuda.is_available():
        yield
        return
    name = "transformer_engine.pytorch.optimizers"
    places: list[tuple[Any, str, Any]] = [
        (core, "Adam", FusedAdam),
        (core, "USING_PYTORCH_OPTIMIZER", False),
        (core, "is_te_min_version", lambda _: True),
        (optimizer_config, "is_te_min_version", lambda _: True),
    ]
    before = [(place, attribute, getattr(place, attribute)) for place, attribute, _ in places]
    absent = {part: sys.modules.get(part) for part in _prefixes(name)}
    try:
        sys.modules.update({part: ModuleType(part) for part in absent})
        sys.modules[name].FusedAdam = FusedAdam  # type: ignore[attr-defined]
        for place, attribute, value in places:
            setattr(place, attribute, value)
        yield
    finally:
        for place, attribute, value in before:
            setattr(place, attribute, value)
        for part, module in absent.items():
            sys.modules.pop(part)
            if module is not None:
                sys.modules[part] = module


def _prefixes(name: str) -> list[str]:
    """Return the names of a module and of the packages that it is in."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _decay_rule(adamw: AdamW) -> dict[ParamKey, ParamGroupOverride]:
    """Say it for all parameters: core's own rule, by the number of axes, does not apply then."""
    names = tuple(pattern for kind in adamw.no_decay for pattern in PATTERNS[kind])
    return {ParamKey(name=names): ParamGroupOverride(wd_mult=0.0)} if names else {}


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Set the rate of the next step for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)


def _norm_of_all(
    _: int, __: Tensor, lists: list[list[Tensor]], *___: object
) -> tuple[Tensor, None]:
    """L2 norm over many tensors in one pass, under the signature of apex's multi_tensor_l2norm."""
    norms = torch._foreach_norm(lists[0], dtype=torch.float32)  # of bfloat16 gradients too
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def _scale_in_place(_: int, __: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """Scale many tensors, under the signature of apex's multi_tensor_scale."""
    torch._foreach_mul_(lists[1], scale)  # Megatron passes the same tensors as source and target


def _use_fused_clipping() -> None:
    """Core's stand-ins for apex copy each gradient, and read each norm back alone (utils.py 1325).

    Only where core has to use them.
    """
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm_of_all
        clip_grads.multi_tensor_scale_impl = _scale_in_place


def _use_fused_kernel(optimizer: MegatronOptimizer) -> None:
    """Take torch's one-kernel AdamW; by default it loops over the parameters on a CPU.

    Its moments start at zero here rather than at the first step: Megatron asks for their step
    count when it loads a checkpoint (distrib_optimizer.py 838, core 0.19.2).
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        for group in inner.param_groups:
            if "fused" not in group:  # Transformer Engine's, which is fused by itself
                return
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
