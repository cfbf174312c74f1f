"""The family nemotron_h (Nemotron-H, Nano 2 and 3, Super): config.json and names of tensors.

What the family fixes (no bias, squared ReLU, no positions, no routing groups, ...) is written out
and, in a config that is read, demanded: a model that differs there is another model.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from hybrid_train.anatomy.kinds import CONV_WIDTH
from hybrid_train.anatomy.layers import mtp_blocks
from hybrid_train.hf.family import LENGTH, Family
from hybrid_train.hf.fields import Field, read_fields, senseless, written_fields
from hybrid_train.hf.names import Spelling, Stored, table
from hybrid_train.schema.model import SECTIONS, Activation, Model, NormKind
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.problems import UserError, collect

_LAYER_KEYS = (
    "hybrid_override_pattern",
    "layer_types",
    "layers_block_type",
    "mtp_hybrid_override_pattern",
    "mtp_layers_block_type",
    "mtp_num_layers",
    "num_hidden_layers",
    "num_nextn_predict_layers",
)
LAYER_TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLDER_TYPES = {"mamba": "M", "mamba2": "M", "attention": "*"}
# What every model of the family has, whatever its size.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "conv_kernel": CONV_WIDTH,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "sliding_window": None,
}
_OLDER_FIXED = {"conv_kernel": ("mamba_d_conv",), "use_conv_bias": ("mamba_conv_bias",)}
_SAID = {  # no part of the computation, but asked for by some readers
    "attention_dropout": 0.0,
    "expand": 2,
    "hidden_dropout": 0.0,
    "mamba_ssm_cache_dtype": "float32",
    "moe_shared_expert_overlap": True,
    "num_logits_to_keep": 1,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "time_step_floor": 1e-4,
    "time_step_max": 0.1,
    # Steps of the family have no limit, which is the default of time_step_limit; transformers 5.23
    # takes this key for one (modeling_nemotron_h.py 414). 0 would break its initialisation, a
    # logarithm.
    "time_step_min": 1e-30,
    "use_cache": True,
    "use_mamba_kernels": True,
}
_FIELDS = (
    Field("hidden_size", "hidden_size", 4096),
    Field("vocab_size", "vocab_size", 131072),
    Field("norm_eps", "layer_norm_epsilon", 1e-5, ("rms_norm_eps", "norm_eps")),
    Field("init_std", "initializer_range", 0.02),
    Field("tie_embeddings", "tie_word_embeddings", False),
    Field("attention.heads", "num_attention_heads", 32),
    Field("attention.kv_heads", "num_key_value_heads", 8),
    Field("attention.head_dim", "head_dim", 128, ("attention_head_dim",)),
    Field("mamba.heads", "mamba_num_heads", 128),
    Field("mamba.head_dim", "mamba_head_dim", 64),
    Field("mamba.state_size", "ssm_state_size", 128, ("mamba_state_dim", "mamba_d_state")),
    Field("mamba.groups", "n_groups", 8, ("mamba_n_groups", "mamba_num_groups")),
    Field("mamba.chunk_size", "chunk_size", 128, ("mamba_chunk_size",)),
    Field("mlp.intermediate_size", "intermediate_size", 21504),
    Field("moe.experts", "n_routed_experts", 8, ("num_local_experts",)),
    Field("moe.top_k", "num_experts_per_tok", 2),
    Field("moe.intermediate_size", "moe_intermediate_size", 7688),
    Field("moe.shared_intermediate_size", "moe_shared_expert_intermediate_size", 7688),
    Field("moe.latent_size", "moe_latent_size", None),
    Field("moe.scaling_factor", "routed_scaling_factor", 1.0),
    Field("mtp.repeated_block", "mtp_use_repeated_layer", True),
)
# Ours below a layer -> theirs; parts that alternate are tensors of their own on that side.
_THEIRS = {
    "mixer.in_proj.layer_norm_weight": "norm.weight",
    **{
        same: same
        for same in (
            "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.A_log",
            "mixer.D", "mixer.dt_bias", "mixer.norm.weight", "mixer.out_proj.weight",
        )
    },
    "self_attention.linear_qkv.layer_norm_weight": "norm.weight",
    "self_attention.linear_qkv.weight": "mixer.{part}_proj.weight",
    "self_attention.linear_proj.weight": "mixer.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "norm.weight",
    "mlp.linear_fc1.weight": "mixer.up_proj.weight",
    "mlp.linear_fc2.weight": "mixer.down_proj.weight",
    "pre_mlp_layernorm.weight": "norm.weight",
    "mlp.router.weight": "mixer.gate.weight",
    "mlp.router.expert_bias": "mixer.gate.e_score_correction_bias",
    "mlp.fc1_latent_proj.weight": "mixer.fc1_latent_proj.weight",
    "mlp.fc2_latent_proj.weight": "mixer.fc2_latent_proj.weight",
    "mlp.shared_experts.linear_fc1.weight": "mixer.shared_experts.up_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mixer.shared_experts.down_proj.weight",
    "mlp.experts.experts.linear_fc1.weight": "mixer.experts.{expert}.up_proj.weight",
    "mlp.experts.experts.linear_fc2.weight": "mixer.experts.{expert}.down_proj.weight",
    **{
        same: same
        for same in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight")
    },
}  # fmt: skip


class NemotronH(Family):
    """Hybrids of Mamba-2, attention, MLPs and experts."""

    model_type = "nemotron_h"
    architecture = "NemotronHForCausalLM"
    spelling = Spelling(
        "backbone.embeddings.weight", "backbone.layers.", _THEIRS, "backbone.norm_f"
    )
    length = 4096
    stores_tied_head = True  # transformers 5.23 ties nothing: it reads a head of its own

    def to_model(self, config: Mapping[str, Any], path: Path) -> Model:
        faults = [*_foreign(config)]
        model = Model(pattern="", hidden_size=0)
        faults += read_fields(_FIELDS, config, model)
        try:
            model.pattern = str(_pattern(config))
        except ValueError as error:
            faults.append(str(error))
        faults += senseless(LENGTH, config.get(LENGTH), self.length)
        if not faults:
            _leave_out_unused(model, config)
            faults += [f"{problem}" for problem in collect(model)] or [*_uneven(model)]
        if faults:
            raise UserError(
                f"{path} does not describe a model of the family:\n  " + "\n  ".join(faults)
            )
        return model

    def refusals(self, model: Model) -> Iterator[str]:
        layers, attention, mlp = parse(model.pattern).layers, model.attention, model.mlp
        if "E" in layers and model.moe.shared_intermediate_size is None:
            yield (
                "model.moe.shared_intermediate_size is null: transformers' NemotronH always has a "
                "shared expert"
            )
        if model.norm is not NormKind.rms:
            yield f"model.norm is {model.norm.value}: it has RMSNorm"
        if "*" in layers and attention.rope.theta is not None:
            yield f"model.attention.rope.theta is {attention.rope.theta:g}: it has no positions"
        for name in ("qkv_bias", "qk_norm"):
            if "*" in layers and getattr(attention, name):
                yield f"model.attention.{name} is true: its attention has none"
        if "-" in layers and (mlp.gated or mlp.activation is not Activation.squared_relu):
            yield (
                f"model.mlp.activation is {mlp.activation.value}, gated {str(mlp.gated).lower()}: "
                "its MLPs are of squared ReLU without gates"
            )

    def to_config(
        self, model: Model, *, vocab_size: int, length: int, dtype: str,
        token_ids: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        pattern = parse(model.pattern)
        assert not model.layers, "one size for all layers of a kind (`hf/padding.py`)"
        sizes = written_fields(_FIELDS, model)
        if model.moe.shared_intermediate_size is None:
            sizes["moe_shared_expert_intermediate_size"] = model.moe.intermediate_size
        config = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **_FIXED,
            **_SAID,
            **sizes,
            **token_ids,
            "vocab_size": vocab_size,
            LENGTH: length,
            "num_hidden_layers": len(pattern.main),
            "hybrid_override_pattern": pattern.main,
            "num_nextn_predict_layers": mtp_blocks(model),
            "torch_dtype": dtype,
        }
        if pattern.mtp:
            config["mtp_hybrid_override_pattern"] = pattern.mtp
            config["mtp_num_layers"] = pattern.mtp_depths
        return dict(sorted(config.items()))

    def computation_keys(self, model: Model) -> set[str]:
        del model
        fields = (key for field in _FIELDS for key in (field.theirs, *field.older))
        older = (key for keys in _OLDER_FIXED.values() for key in keys)
        return {*fields, *older, *_FIXED, *_LAYER_KEYS, "time_step_limit", "mamba_dt_limit"}

    def table(self, model: Model, vocab_size: int) -> Iterator[Stored]:
        numbers = range(len(parse(model.pattern).main))
        return table(model, vocab_size, self.spelling, numbers)

    def released(self, name: str) -> str | None:
        """Give a tensor of transformers' class its released name, `backbone.`."""
        if name.startswith("model."):
            name = f"backbone.{name.removeprefix('model.')}"
        return self.spelling.embedding if name == "backbone.embedding.weight" else name

    def as_trained(self, said: Mapping[str, Any], *, length: int, dtype: str) -> dict[str, Any]:
        config = super().as_trained(said, length=length, dtype=dtype)
        limit = config.get("time_step_limit")
        if _is_no_limit(limit) and math.inf in limit:
            del config["time_step_limit"]  # no JSON, and the default
        return config


def _leave_out_unused(model: Model, config: Mapping[str, Any]) -> None:
    """Give sections of layers that the model lacks their defaults: their sizes mean nothing."""
    if config.get("num_key_value_heads", 0) is None:
        model.attention.kv_heads = model.attention.heads
    if not model.moe.shared_intermediate_size:
        model.moe.shared_intermediate_size = None
    for letter, section in SECTIONS.items():
        if letter not in model.pattern:
            setattr(model, section, type(getattr(model, section))())


def _uneven(model: Model) -> Iterator[str]:
    """Yield the groups that do not have as many heads each."""
    attention, mamba = model.attention, model.mamba
    for key, groups, heads in (
        ("num_key_value_heads", attention.kv_heads, attention.heads),
        ("n_groups", mamba.groups, mamba.heads),
    ):
        if heads % groups:
            yield f"{key} is {groups}; it must divide the number of heads, {heads}"


def _foreign(config: Mapping[str, Any]) -> Iterator[str]:
    for key, wanted in _FIXED.items():
        spelt = next((old for old in _OLDER_FIXED.get(key, ()) if old in config), key)
        value = config.get(spelt, wanted)
        if key in ("n_group", "topk_group") and value is None:
            continue
        if key == "n_shared_experts" and type(value) is int:
            continue  # their widths are given as a sum
        if value != wanted:
            yield f"{spelt} is {value!r}, and {wanted!r} in all models that are known here"
    limit = config.get("time_step_limit", config.get("mamba_dt_limit"))
    if limit is not None and not _is_no_limit(limit):
        yield f"time_step_limit is {limit!r}, and [0, Infinity] in all models that are known here"


def _is_no_limit(limit: Any) -> TypeGuard[list[Any]]:
    """Tell whether it is [0, inf]; transformers 5 writes {"__float__": "Infinity"} for inf."""
    if not isinstance(limit, list) or len(limit) != 2:  # noqa: PLR2004  low, high
        return False
    high = limit[1].get("__float__") if isinstance(limit[1], dict) else limit[1]
    return limit[0] == 0 and high in (math.inf, "Infinity")


def _pattern(config: Mapping[str, Any]) -> Pattern:
    """Read the layers, from a list of words or from a string, and those of MTP.

    Raises:
        ValueError: if there are none, or not as many as the config says.
    """
    words = config.get("layers_block_type") or config.get("layer_types")
    text = _letters(words) if words else config.get("hybrid_override_pattern")
    if not isinstance(text, str) or not text:
        raise ValueError("it has neither layers_block_type nor hybrid_override_pattern")
    written = parse(text)
    layers = config.get("num_hidden_layers")
    if layers is not None and layers != len(written.main):
        raise ValueError(f"num_hidden_layers is {layers}, but the pattern has {len(written.main)}")
    depths = config.get("num_nextn_predict_layers") or 0
    if written.mtp:
        return Pattern((written.main,), written.mtp, written.mtp_depths)
    if not depths:
        return Pattern((written.main,))
    words = config.get("mtp_layers_block_type")
    mtp = config.get("mtp_hybrid_override_pattern") or (_letters(words) if words else None)
    if not isinstance(mtp, str) or type(depths) is not int:
        raise ValueError("num_nextn_predict_layers needs mtp_hybrid_override_pattern")
    # One block of weights may serve several depths; ours says how many (`to_config`).
    depths = max(depths, config.get("mtp_num_layers") or 0)
    if depths > len(text) + 16:
        raise ValueError(f"num_nextn_predict_layers is {depths}")
    return parse(written.main + f"/{mtp}" * depths)


def _letters(words: Any) -> str:
    known = {word: letter for letter, word in LAYER_TYPES.items()} | _OLDER_TYPES
    if not isinstance(words, list) or not all(word in known for word in words):
        raise ValueError(f"layers_block_type has other words than {', '.join(known)}: {words!r}")
    return "".join(known[word] for word in words)


NEMOTRON_H = NemotronH()
