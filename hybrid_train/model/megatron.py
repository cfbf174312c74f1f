"""Gateway to Megatron-Core's models: its version, and the symbols we put in its place.

Each replacement below names the line of core 0.19.2 that makes it necessary. When the pinned
version changes, read them again.
"""

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.hybrid import hybrid_block
from megatron.core.ssm import mamba_mixer
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_layer, router
from torch import Tensor

from hybrid_train.anatomy.kinds import possible_parameters
from hybrid_train.model import plain
from hybrid_train.ops import mixer, mixer_step
from hybrid_train.ops.linear import add_product, linear
from hybrid_train.precision import fp8_weights
from hybrid_train.schema.problems import UserError

CORE_VERSION = "0.19.2"
# Its package gives the name to a function of the module.
finalize_grads = importlib.import_module("megatron.core.distributed.finalize_model_grads")
# Parameters and buffers that stay in float32 in a bfloat16 model, by the ends of their names; the
# last is core's own count, which no checkpoint holds.
FLOAT32 = (
    *(one.name.rpartition(".")[2] for one in possible_parameters() if one.float32),
    "local_tokens_per_expert",
)


def require_version() -> None:
    """Raise a UserError if another megatron-core is installed than the one we know."""
    found = version("megatron-core")
    if found != CORE_VERSION:
        raise UserError(
            f"megatron-core {found} is installed, but {CORE_VERSION} is needed; "
            f"install it: pip install megatron-core=={CORE_VERSION}"
        )


def use_plain_layers() -> None:
    """Let core build our layers where it names Transformer Engine's itself."""
    _replace(hybrid_block, TENorm=plain.Norm)  # hybrid_block.py 215: final norm of the stack
    _replace(moe_layer, HAVE_TE=True, TELinear=plain.DuplicatedLinear)  # moe_layer.py 266: latent


def use_recipes(make: Callable[[str], Any]) -> None:
    """Give core's modules recipes with our options (extensions/transformer_engine.py 336).

    Core makes those that it knows by name without any option; of a custom one it asks a function
    for quantizers, by its path. A name of ours takes the place of that path.

    Args:
        make: name of a format -> recipe object of Transformer Engine.
    """
    _replace(fp8_utils, _get_custom_recipe=make)


def use_fp8_weights() -> None:
    """Let core's buffers and optimizer know our weights in FP8 as Transformer Engine's (66)."""
    _replace(
        fp8_utils,
        HAVE_TE_FP8_TENSOR_CLASS=True,
        FP8_TENSOR_CLASS=fp8_weights.Float8Weight,
        _modify_underlying_storage_impl=fp8_weights.replace_codes,
        _quantize_param_shard_impl=fp8_weights.quantize_shards,
    )


def is_in_fp8(weight: Tensor) -> bool:
    """Tell whether a weight is kept in FP8, by us or by Transformer Engine."""
    return bool(fp8_utils.is_float8tensor(weight))


def use_plain_latent_linears() -> None:
    """Let core build our latent projections beside other parts of Transformer Engine (266)."""
    _replace(moe_layer, TELinear=plain.DuplicatedLinear)


def use_plain_mamba() -> None:
    """Let core's Mamba mixer run our scan, convolution and gated norm (mamba_mixer.py 202)."""
    _replace(
        mamba_mixer,
        HAVE_MAMBA_SSM=True,
        ExtendedRMSNorm=plain.GatedNorm,
        mamba_split_conv1d_scan_combined=mixer.mamba_split_conv1d_scan_combined,
        mamba_chunk_scan_combined=mixer.mamba_chunk_scan_combined,
        causal_conv1d_fn=mixer_step.causal_conv1d_fn,
        causal_conv1d_update=mixer_step.causal_conv1d_update,
        selective_state_update=mixer_step.selective_state_update,
        MAMBA_HAS_STATE_DTYPE=False,
    )


def begin_in_float32(model: torch.nn.Module) -> None:
    """Hold in float32 what stays so; core makes dt_bias in the format of the model (368)."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.rpartition(".")[2] in FLOAT32:
            tensor.data = tensor.data.float()


def use_gradient_accumulation() -> None:
    """Let linear layers add to the gradient buffer as they multiply (layers.py 680).

    Core asks apex's extension for it; without one the product is stored, then added.
    """

    def add(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
        add_product(main_grad, grad, x)

    fused = types.SimpleNamespace(wgrad_gemm_accum_fp32=add, wgrad_gemm_accum_fp16=add)
    layers.fused_weight_gradient_mlp_cuda = fused
    _replace(layers, _grad_accum_fusion_available=True)


def use_family_routing() -> None:
    """Let routers weigh the chosen experts as the family does, in one order.

    Without gradients, as in the first pass of a recomputed layer, core leaves the experts unsorted
    (moe_utils.py 823): sums over them would differ in the last bit. And the weight of a single one
    it does not divide by itself (868), which config.json says of the family (norm_topk_prob).
    """
    _replace(router, topk_routing_with_score_function=_route)


_core_route = router.topk_routing_with_score_function


@functools.wraps(_core_route)
def _route(
    logits: Tensor, topk: int, *args: Any, scaling_factor: float | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():  # scores that were made without carry none: no graph is kept
        if topk > 1:
            return _core_route(logits, topk, *args, scaling_factor=scaling_factor, **kwargs)
        weights, chosen = _core_route(logits, topk, *args, **kwargs)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * (scaling_factor or 1.0), chosen


def use_own_numbers_of_experts() -> None:
    """Update the expert biases of routers with equally many experts together.

    Core stacks those of all routers (finalize_model_grads.py 361), and layers may differ.
    """
    _replace(finalize_grads, _update_router_expert_bias=_update_biases)


_core_update_biases = finalize_grads._update_router_expert_bias


def _update_biases(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
    routers: dict[int, list[torch.nn.Module]] = {}
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, router.TopKRouter):
                routers.setdefault(module.num_experts, []).append(module)
    for number in sorted(routers):
        _core_update_biases(routers[number], *args, **kwargs)


def mark_mtp_routers(model: Any) -> None:
    """Tell the routers of the MTP block where they are.

    Core's hybrid stack does not (hybrid_block.py 191), so the balance loss of a block that serves
    several depths would count once for each.
    """
    if getattr(model, "mtp", None) is not None:
        for module in model.mtp.modules():
            if isinstance(module, router.TopKRouter):
                module.is_mtp_layer = True


def _replace(module: Any, **symbols: Any) -> None:
    for name, value in symbols.items():
        assert hasattr(module, name), f"{module.__name__} has no {name} any more"
        setattr(module, name, value)


def use_batched_decoding() -> None:
    """Let the Mamba mixers decode several sequences at once.

    With a static cache core passes one token of each of B sequences on as B tokens of a single
    sequence: the first state takes them all, without a word (mamba_mixer.py 700-714).
    """
    _replace(mamba_mixer.MambaMixer, _ssm_decode=_decode_batch)


_ssm_decode = mamba_mixer.MambaMixer._ssm_decode


def _decode_batch(mixer: Any, packed: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Advance the mixer by one token: packed [1, B, width] -> [1, B, inner]."""
    if kwargs.get("batch_indices") is not None:  # dynamic batching has turned it already
        return _ssm_decode(mixer, packed, *args, **kwargs)
    return _ssm_decode(mixer, packed.transpose(0, 1), *args, **kwargs).transpose(0, 1)


def use_direct_products() -> None:
    """Let a linear layer that talks to no other rank be its product alone (layers.py 755).

    What core wraps around it serves tensor parallelism, and costs a small model on a CPU a sixth of
    each decoding step; the product itself is the fastest one we know.
    """
    _replace(layers, linear_with_grad_accumulation_and_async_allreduce=_linear)


_split_linear = layers.linear_with_grad_accumulation_and_async_allreduce


@functools.wraps(_split_linear)  # with the attribute `warned` that core keeps on it
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    if InferenceMode.is_active():  # by `inference` alone, where no sequence is split
        return torch.nn.functional.linear(input, weight, bias)
    if bias is not None or kwargs["allreduce_dgrad"] or kwargs["sequence_parallel"]:
        return _split_linear(input, weight, bias, *args, **kwargs)
    # A weight that the embedding shares gets gradients elsewhere too: they meet in an ordinary one.
    # So do those of a weight whose buffer lives from one reduction to the next.
    shared = getattr(weight, "zero_out_wgrad", False) or hasattr(weight, "__fsdp_param__")
    buffer = None if shared else getattr(weight, "main_grad", None)
    if buffer is not None:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return linear(input, weight, buffer)


def mamba_mixers(model: torch.nn.Module) -> list[Any]:
    """Return the Mamba mixers of a module, in order."""
    return [part for part in model.modules() if isinstance(part, mamba_mixer.MambaMixer)]


def use_norm_eps(model: torch.nn.Module, eps: float) -> None:
    """Have the gated norms of Mamba layers take the model's epsilon.

    Core 0.19.2 gives them 1e-5 whatever layernorm_epsilon says (mamba_mixer.py 419).
    """
    for layer in mamba_mixers(model):
        layer.norm.eps = eps


def static_context(num_sequences: int, max_length: int) -> Any:
    """Return an empty cache of Megatron for sequences of equal length, decoded together."""
    return StaticInferenceContext(num_sequences, max_length)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Let core's layers use the cache they are given, without gradients, for one forward pass."""
    with torch.inference_mode(), InferenceMode.active():
        yield


def parameter_count(chunks: list[torch.nn.Module]) -> int:
    """Count the parameters that this process holds."""
    return sum(p.numel() for chunk in chunks for p in chunk.parameters())
