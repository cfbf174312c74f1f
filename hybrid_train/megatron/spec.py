"""The parts of a hybrid model in two flavours, put together by one builder.

Plain is PyTorch on any device; fused is Transformer Engine. Both give the same parameter names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from hybrid_train.anatomy.layers import Layer
from hybrid_train.megatron import mamba, norms, plain
from hybrid_train.megatron.hybrid import MtpLayer
from hybrid_train.megatron.mamba import MambaMixer
from hybrid_train.megatron.router import TopKRouter
from hybrid_train.megatron.transformer_config import layer_config
from hybrid_train.schema.model import NormKind


@dataclass(frozen=True)
class Parts:
    """The classes one flavour is made of."""

    norm: Any
    head_norm: Any  # of queries and keys
    norm_column_linear: Any  # a norm and the linear behind it, in one module
    column_linear: Any
    row_linear: Any
    attention: Any
    experts: Callable[..., Any]


PLAIN = Parts(
    norm=norms.Norm,
    head_norm=norms.HeadNorm,
    norm_column_linear=plain.NormColumnLinear,
    column_linear=plain.ColumnParallelLinear,
    row_linear=plain.RowParallelLinear,
    attention=plain.Attention,
    experts=plain.Experts,
)


def plain_parts(norm: NormKind) -> Parts:
    """Return the plain classes with a kind of norm; those of Transformer Engine ask the config."""
    if norm is NormKind.rms:
        return PLAIN
    linear = plain.LayerNormColumnLinear
    return replace(PLAIN, norm=norms.LayerNorm, norm_column_linear=linear)


def fused_parts() -> Parts:
    """Return the classes of Transformer Engine; it must be installed."""
    return Parts(
        norm=te.TENorm,
        head_norm=te.TENorm,
        norm_column_linear=te.TELayerNormColumnParallelLinear,
        column_linear=te.TEColumnParallelLinear,
        row_linear=te.TERowParallelLinear,
        attention=mamba.attention_of_documents(),
        experts=partial(
            TEGroupedMLP,
            submodules=GroupedMLPSubmodules(
                linear_fc1=te.TEColumnParallelGroupedLinear,
                linear_fc2=te.TERowParallelGroupedLinear,
            ),
        ),
    )


def with_plain_linears(parts: Parts, norm: NormKind) -> Parts:
    """Return the parts with linear layers whose GEMMs can be emulated."""
    kept = {"norm": parts.norm, "head_norm": parts.head_norm, "attention": parts.attention}
    return replace(plain_parts(norm), **kept)


def hybrid_spec(
    parts: Parts,
    *,
    mamba_chunk_size: int,
    mamba_layer: type[MambaLayer] = MambaLayer,
    layers: Sequence[Layer] = (),
    qk_norm: bool = False,
) -> ModuleSpec:
    """Return the spec of a stack of M, *, - and E layers with MTP, made of `parts`.

    Args:
        parts: the classes.
        mamba_chunk_size: of the scan.
        mamba_layer: the class of M layers.
        layers: of the model; those with sizes of their own are built so.
        qk_norm: whether heads of queries and keys are normalised.
    """
    return ModuleSpec(
        module=Stack,
        params={"norm": parts.norm},
        submodules=HybridStackSubmodules(
            mamba_layer=_sized(_mamba_layer(parts, mamba_layer, mamba_chunk_size), layers),
            attention_layer=_sized(_attention_layer(parts, qk_norm=qk_norm), layers),
            mlp_layer=_sized(_mlp_layer(parts), layers),
            moe_layer=_sized(_moe_layer(parts), layers),
            mtp_block_spec=_mtp_block(parts),
        ),
    )


class Stack(HybridStack):
    """Core's stack with a final norm of our parts; core names the class itself (215)."""

    def __init__(self, config: TransformerConfig, *args: Any, norm: Any, **settings: Any) -> None:
        super().__init__(config, *args, post_layer_norm=False, **settings)
        if self.post_process:
            self.post_layer_norm = True
            self.final_norm = norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def _sized(spec: ModuleSpec, layers: Sequence[Layer]) -> ModuleSpec:
    """Return the spec with a class that takes the sizes of each layer.

    Core's stack gives all layers one config (hybrid_block.py 126), and a number from 1 on the whole
    pipeline. That of an MTP block begins anew; the name of such a layer says where it is.
    """
    own = {(layer.depth > 0, layer.number): layer for layer in layers if layer.given}
    if not own:
        return spec
    core: Any = spec.module

    class SizedLayer(core):
        def __init__(
            self, config: TransformerConfig, *args: Any, layer_number: int, name: str, **kw: Any
        ) -> None:
            layer = own.get((name.startswith("mtp."), layer_number))
            config = config if layer is None else layer_config(config, layer)
            super().__init__(config, *args, layer_number=layer_number, name=name, **kw)

    return replace(spec, module=SizedLayer)


def _mamba_layer(parts: Parts, layer: type[MambaLayer], chunk_size: int) -> ModuleSpec:
    mixer = ModuleSpec(
        module=MambaMixer,
        params={"chunk_size": chunk_size},
        submodules=MambaMixerSubmodules(
            in_proj=parts.norm_column_linear, out_proj=parts.row_linear
        ),
    )
    return ModuleSpec(
        module=layer,
        submodules=MambaLayerSubmodules(mixer=mixer, mamba_bda=get_bias_dropout_add),
    )


def _attention_layer(parts: Parts, *, qk_norm: bool) -> ModuleSpec:
    head_norm = parts.head_norm if qk_norm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.norm_column_linear,
            core_attention=parts.attention,
            linear_proj=parts.row_linear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention, self_attn_bda=get_bias_dropout_add
        ),
    )


def _mlp_layer(parts: Parts) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=parts.norm_column_linear, linear_fc2=parts.row_linear)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            mlp=partial(plain.Mlp.as_mlp_submodule, submodules=linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _moe_layer(parts: Parts) -> ModuleSpec:
    shared = MLPSubmodules(linear_fc1=parts.column_linear, linear_fc2=parts.row_linear)
    layer = partial(
        MoELayer,
        submodules=MoESubmodules(
            experts=parts.experts,
            shared_experts=partial(SharedExpertMLP, submodules=shared),
            router=TopKRouter,
        ),
    )
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.norm, mlp=layer, mlp_bda=get_bias_dropout_add
        ),
    )


def _mtp_block(parts: Parts) -> ModuleSpec:
    depth = ModuleSpec(
        module=MtpLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=parts.norm,
            hnorm=parts.norm,
            eh_proj=parts.column_linear,
            mtp_model_layer=None,  # built from the pattern
            layer_norm=parts.norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[depth]),
    )
