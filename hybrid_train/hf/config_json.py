"""config.json of the family, read as our model section and written from it; old spellings included.

What the family fixes (no bias, squared ReLU, no routing groups, ...) is written out and, in a
config that is read, demanded: a model that differs there is another model.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeGuard

from hybrid_train.anatomy.kinds import CONV_WIDTH
from hybrid_train.anatomy.layers import mtp_blocks
from hybrid_train.schema.model import SECTIONS, Model
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.problems import UserError, collect

FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MODEL_TYPE = "nemotron_h"
LENGTH = "max_position_embeddings"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPE_KEYS = ("torch_dtype", "dtype")
_TOKEN_KEYS = (  # of a generation config, lists of token ids
    "bad_words_ids",
    "begin_suppress_tokens",
    "force_words_ids",
    "forced_decoder_ids",
    "sequence_bias",
    "suppress_tokens",
)
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
_LARGEST = 2**24  # no size of the family is near; a larger one is a mistake, or meant to hurt
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


@dataclass(frozen=True)
class _Field:
    """A size that both sides have."""

    ours: str  # dotted path below the model section
    theirs: str
    default: object  # of transformers' class, where a config leaves it out
    older: tuple[str, ...] = ()  # former spellings

    def read(self, config: Mapping[str, Any]) -> Any:
        for key in (self.theirs, *self.older):
            if config.get(key) is not None:
                return config[key]
        return self.default


_FIELDS = (
    _Field("hidden_size", "hidden_size", 4096),
    _Field("vocab_size", "vocab_size", 131072),
    _Field("norm_eps", "layer_norm_epsilon", 1e-5, ("rms_norm_eps", "norm_eps")),
    _Field("init_std", "initializer_range", 0.02),
    _Field("tie_embeddings", "tie_word_embeddings", False),
    _Field("attention.heads", "num_attention_heads", 32),
    _Field("attention.kv_heads", "num_key_value_heads", 8),
    _Field("attention.head_dim", "head_dim", 128, ("attention_head_dim",)),
    _Field("mamba.heads", "mamba_num_heads", 128),
    _Field("mamba.head_dim", "mamba_head_dim", 64),
    _Field("mamba.state_size", "ssm_state_size", 128, ("mamba_state_dim", "mamba_d_state")),
    _Field("mamba.groups", "n_groups", 8, ("mamba_n_groups", "mamba_num_groups")),
    _Field("mamba.chunk_size", "chunk_size", 128, ("mamba_chunk_size",)),
    _Field("mlp.intermediate_size", "intermediate_size", 21504),
    _Field("moe.experts", "n_routed_experts", 8, ("num_local_experts",)),
    _Field("moe.top_k", "num_experts_per_tok", 2),
    _Field("moe.intermediate_size", "moe_intermediate_size", 7688),
    _Field("moe.shared_intermediate_size", "moe_shared_expert_intermediate_size", 7688),
    _Field("moe.latent_size", "moe_latent_size", None),
    _Field("moe.scaling_factor", "routed_scaling_factor", 1.0),
    _Field("mtp.repeated_block", "mtp_use_repeated_layer", True),
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        UserError: if it is missing, no JSON, or of another kind of model.
    """
    path = folder / FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != MODEL_TYPE:
        raise UserError(f"{path}: model_type is {kind!r}; only {MODEL_TYPE} is converted")
    return dict(config)


def to_model(config: Mapping[str, Any], path: Path) -> Model:
    """Translate a config into our model section.

    Raises:
        UserError: naming every key that is missing, senseless, or of another kind of model.
    """
    faults = [*_foreign(config)]
    model = Model(pattern="", hidden_size=0)
    for field in _FIELDS:
        value = field.read(config)
        faults += _senseless(field.theirs, value, field.default)
        section, _, name = field.ours.rpartition(".")
        owner = reduce(getattr, section.split("."), model) if section else model
        setattr(owner, name, value)
    try:
        model.pattern = str(_pattern(config))
    except ValueError as error:
        faults.append(str(error))
    faults += _senseless(LENGTH, config.get(LENGTH), 4096)
    if not faults:
        _leave_out_unused(model, config)
        faults += [f"{problem}" for problem in collect(model)] or [*_uneven(model)]
    if faults:
        raise UserError(
            f"{path} does not describe a model of the family:\n  " + "\n  ".join(faults)
        )
    return model


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


def _senseless(key: str, value: Any, default: object) -> Iterator[str]:
    if value is None or (isinstance(default, bool) and isinstance(value, bool)):
        return
    if isinstance(default, bool):
        yield f"{key} is {value!r}; it must be true or false"
    elif isinstance(default, float):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            yield f"{key} is {value!r}; it must be a number above 0"
    elif type(value) is not int or not 0 <= value <= _LARGEST:
        yield f"{key} is {value!r}; it must be a whole number up to {_LARGEST}"


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


def to_config(
    model: Model, *, vocab_size: int, length: int, dtype: str, token_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """Translate a model section into a complete config.json.

    Args:
        model: our section.
        vocab_size: tokens of the embedding, without padding.
        length: positions it was trained for.
        dtype: number format of most tensors, "bfloat16".
        token_ids: of special tokens, by their keys; empty if there is no tokenizer.

    Raises:
        UserError: if their class cannot compute the model.
    """
    pattern = parse(model.pattern)
    if "E" in pattern.layers and model.moe.shared_intermediate_size is None:
        raise UserError(
            "model.moe.shared_intermediate_size is null: transformers' NemotronH always has a "
            "shared expert, so this model cannot be exported"
        )
    assert not model.layers, "a config.json has one size for all layers of a kind (`hf/padding.py`)"
    sizes: dict[str, Any] = {}
    for field in _FIELDS:
        sizes[field.theirs] = reduce(getattr, field.ours.split("."), model)
    if model.init_std is None:
        sizes["initializer_range"] = 0.9 / math.sqrt(model.hidden_size)
    if model.moe.shared_intermediate_size is None:
        sizes["moe_shared_expert_intermediate_size"] = model.moe.intermediate_size
    config = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": MODEL_TYPE,
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


def changes(before: Model, now: Model) -> list[str]:
    """Name the settings that decide the logits of a model and are not as they were."""
    old, new = _computation(before), _computation(now)
    return [key for key in new if old.get(key) != new[key]]


def renewed(said: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as it was read, but for the keys that describe the computation."""
    keys = _computation_keys()
    kept = {key: value for key, value in said.items() if key not in keys}
    return kept | {key: value for key, value in made.items() if key in keys}


def as_trained(said: Mapping[str, Any], *, length: int, dtype: str) -> dict[str, Any]:
    """Return a config of the same model in another number format, trained for longer texts."""
    config = dict(said)
    limit = config.get("time_step_limit")
    if _is_no_limit(limit) and math.inf in limit:
        del config["time_step_limit"]  # no JSON, and the default
    for key in DTYPE_KEYS:
        if config.get(key) is not None:
            config[key] = dtype
    before = config.get(LENGTH)
    if type(before) is int and before < length:
        config[LENGTH] = length
    return config


def _computation(model: Model) -> dict[str, object]:
    """Return what of a model decides its logits, by the names of our settings."""
    pattern = parse(model.pattern)
    found: dict[str, object] = {"pattern": str(pattern)}
    absent = {section for letter, section in SECTIONS.items() if letter not in pattern.layers}
    for field in _FIELDS:
        section = field.ours.partition(".")[0]
        is_used = section not in absent and (section != "mtp" or pattern.mtp)
        if is_used and field.ours != "init_std":
            found[field.ours] = reduce(getattr, field.ours.split("."), model)
    return found


def _computation_keys() -> set[str]:
    """Return every key, the former spellings included, that `to_model` reads or demands."""
    fields = (key for field in _FIELDS for key in (field.theirs, *field.older))
    older = (key for keys in _OLDER_FIXED.values() for key in keys)
    return {*fields, *older, *_FIXED, *_LAYER_KEYS, "time_step_limit", "mamba_dt_limit"}


def names_tokens(key: str) -> bool:
    """Tell whether the value of a key is made of token ids, which mean nothing elsewhere."""
    return key.endswith(("_token_id", "_token_ids")) or key in _TOKEN_KEYS


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation config that follows from a config.json."""
    return {
        "_from_model_config": True,
        **{key: config[key] for key in TOKEN_IDS if config.get(key) is not None},
        "use_cache": True,
    }
