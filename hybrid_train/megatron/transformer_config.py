"""A job as the config of Megatron-Core, and the layers that it recomputes.

Core (0.19.2) recomputes whole layers and the modules of most kinds; what it lacks stands here: a
Mamba layer that is recomputed.
"""

import copy
import math
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.extensions import transformer_engine as te
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import Layer
from hybrid_train.megatron import gpu_switches, native_recipes
from hybrid_train.ops.nonlinearity import squared_relu
from hybrid_train.schema.model import Activation, Model, NormKind
from hybrid_train.schema.parallel import Parallel, Recompute, RecomputeModule
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.precision import NumberFormat
from hybrid_train.schema.train import TrainJob

_ACTIVATIONS = {Activation.squared_relu: squared_relu, Activation.silu: functional.silu}
DTYPES = {NumberFormat.fp32: torch.float32, NumberFormat.bf16: torch.bfloat16}
_FIELDS_OF_AXES = {  # sizes that may differ from layer to layer -> fields of TransformerConfig
    Axis.heads: "num_attention_heads",
    Axis.kv_groups: "num_query_groups",
    Axis.ssm_heads: "mamba_num_heads",
    Axis.ssm_head_dim: "mamba_head_dim",
    Axis.ffn: "ffn_hidden_size",
    Axis.experts: "num_moe_experts",
    Axis.expert_ffn: "moe_ffn_hidden_size",
    Axis.shared_ffn: "moe_shared_expert_intermediate_size",
}


def transformer_config(
    job: TrainJob, *, on_gpu: bool, fused: bool = False, native: bool = False
) -> TransformerConfig:
    """Translate a checked job; Megatron checks the combination once more.

    Args:
        job: the job.
        on_gpu: whether it runs on GPUs.
        fused: whether Transformer Engine's kernels run there.
        native: whether Transformer Engine computes its quantized GEMMs.
    """
    pattern = parse(job.model.pattern)
    dtype = DTYPES[job.precision.base]
    fields = dict(
        **_shape(job.model),
        **_attention(job, pattern),
        **_experts(job, pattern),
        **_mtp(job, pattern),
        **_layout(job, dtype),
        **_recompute(job.parallel),
        **(native_recipes.config_fields(job) if native else {}),
        # what all models share
        is_hybrid_model=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
        attention_backend=AttnBackend.auto,
        # how it runs
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        init_method_std=init_std(job.model),
        perform_initialization=False,  # model/build.py does it, the same under every layout
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=on_gpu,
        # Core has a fused kernel of SiLU gates alone, and refuses others.
        bias_activation_fusion=on_gpu
        and job.model.mlp.gated
        and job.model.mlp.activation is Activation.silu,
        # Megatron-FSDP has no buffer to add to until gradients are there (layers.py 659).
        gradient_accumulation_fusion=not on_gpu and not job.parallel.fsdp,
        cuda_graph_impl="none",
    )
    return TransformerConfig(
        **(fields | gpu_switches.config_fields(job, on_gpu=on_gpu, fused=fused))
    )


def _shape(model: Model) -> dict[str, object]:
    is_layer_norm = model.norm is NormKind.layer_1p
    return {
        "normalization": "LayerNorm" if is_layer_norm else "RMSNorm",
        "layernorm_zero_centered_gamma": is_layer_norm,
        "activation_func": _ACTIVATIONS[model.mlp.activation],
        "gated_linear_unit": model.mlp.gated,
        "num_layers": len(parse(model.pattern).main),
        "hidden_size": model.hidden_size,
        "layernorm_epsilon": model.norm_eps,
        "ffn_hidden_size": model.mlp.intermediate_size,
        "mamba_num_heads": model.mamba.heads,
        "mamba_head_dim": model.mamba.head_dim,
        "mamba_num_groups": model.mamba.groups,
        "mamba_state_dim": model.mamba.state_size,
    }


def _attention(job: TrainJob, pattern: Pattern) -> dict[str, object]:
    sizes = job.model.attention
    # Core 0.19.2 wants tensor ranks to split them in a model without attention layers too
    # (transformer_config.py 1323).
    unused = None if pattern.count("*") else job.parallel.tensor
    return {
        "num_attention_heads": unused or sizes.heads,
        "num_query_groups": unused or sizes.kv_heads,
        "kv_channels": sizes.head_dim,
        "add_qkv_bias": sizes.qkv_bias,
        "qk_layernorm": sizes.qk_norm,
    }


def _experts(job: TrainJob, pattern: Pattern) -> dict[str, object]:
    if "E" not in pattern.layers:
        return {}
    moe = job.model.moe
    return {
        "num_moe_experts": moe.experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_intermediate_size,
        "moe_latent_size": moe.latent_size,
        "moe_router_score_function": "sigmoid",
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": moe.scaling_factor,
        "moe_router_enable_expert_bias": True,  # at rate 0 it stays 0, and loads are counted
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": job.objective.moe_aux_loss_scale,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }


def _mtp(job: TrainJob, pattern: Pattern) -> dict[str, object]:
    if not pattern.mtp_depths:
        return {}
    return {
        "mtp_num_layers": pattern.mtp_depths,
        "mtp_use_repeated_layer": job.model.mtp.repeated_block,
    }


def _layout(job: TrainJob, dtype: torch.dtype) -> dict[str, object]:
    parallel = job.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": (
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        # Batched, two ranks would mistake each other's activations for gradients: each is the
        # other's next and previous (core 0.19.2, p2p_communication.py 15, Megatron-LM#1450).
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor or parallel.tensor,
        "sequence_parallel": sequence_parallel(job),
        "pipeline_dtype": dtype,
    }


def _recompute(parallel: Parallel) -> dict[str, object]:
    """Return the fields that say what core recomputes; M layers have a class of their own."""
    if parallel.recompute is Recompute.none:
        return {}
    if parallel.recompute is Recompute.full:
        return {
            "recompute_granularity": "full",
            "recompute_method": parallel.recompute_method.value,
            "recompute_num_layers": parallel.recompute_layers,
        }
    names = [part.value for part in parallel.recomputed if part is not RecomputeModule.mamba]
    return {"recompute_granularity": "selective", "recompute_modules": names}


def mamba_layer_class(parallel: Parallel) -> type[MambaLayer]:
    """Return the class of M layers; core has no switch for them (transformer_config.py 1768)."""
    return RecomputedMamba if RecomputeModule.mamba in parallel.recomputed else MambaLayer


class RecomputedMamba(MambaLayer):
    """A Mamba layer that keeps its input and computes the rest again for the gradients."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run: Any = partial(super().forward, **kwargs)
        if not self.training:
            return run(hidden_states, *args)
        if self.config.fp8 or self.config.fp4:  # whose scales only its own checkpoint restores
            tracker = tensor_parallel.random.get_cuda_rng_tracker
            return te.te_checkpoint(run, False, tracker, self.tp_group, hidden_states, *args)
        return tensor_parallel.checkpoint(run, False, hidden_states, *args)


def layer_config(config: TransformerConfig, layer: Layer) -> TransformerConfig:
    """Return the config of one layer: that of the model, but for sizes that a rule gives.

    Core checks a config once, as a whole; the rules of `config/rules_of_layout.py` hold for each.
    """
    if not layer.given:
        return config
    own, sizes = copy.copy(config), layer.sizes
    for axis, field in _FIELDS_OF_AXES.items():
        if axis.value in layer.given:
            setattr(own, field, sizes.along(axis))
    return own


def init_std(model: Model) -> float:
    """Return the standard deviation of new weights: 0.9 / sqrt(hidden) as in the released models.

    Source: the init_method_std of the published training configurations.
    """
    return model.init_std if model.init_std is not None else 0.9 / math.sqrt(model.hidden_size)


def sequence_parallel(job: TrainJob) -> bool:
    """Tell whether norms are split along the sequence: on with tensor parallelism unless said."""
    chosen = job.parallel.sequence
    return job.parallel.tensor > 1 if chosen is None else chosen and job.parallel.tensor > 1
