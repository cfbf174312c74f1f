"""Settings of a model as NVIDIA's trainers name them: one table, read and written.

Megatron-LM keeps its arguments in a checkpoint; Megatron-Bridge and NeMo 2 keep the fields of
Megatron-Core's TransformerConfig and of a class of their own that derives from it. An argument has
the name of its field, but for a few, and arguments were renamed; so both names are read.

What our models lack (learned positions, biases of all linears, other activations, groups of
experts, ...) is demanded to be absent: a model that has it is another model, and is refused by its
name. So is what of ours theirs cannot say: rotary embeddings that are scaled for long texts.

Sources: Megatron-LM d98e8a6, training/arguments.py and `load_args_from_checkpoint` in
training/checkpointing.py; Megatron-Bridge 067f987, models/hybrid/hybrid_provider.py; NeMo 8cfedd7,
collections/llm/gpt/model/ssm.py; Megatron-Core 0.19.2, transformer/transformer_config.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from hybrid_train.anatomy.axes import sizes_of
from hybrid_train.anatomy.layers import layers
from hybrid_train.config.rules_of_model import MODEL_RULES
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.job_roots import CountJob
from hybrid_train.schema.model import SECTIONS, Activation, Model, NormKind, RopeScaling
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.problems import UserError, collect

Settings = Mapping[str, Any]  # arguments or fields, by name
GATED_NORM_EPS = 1e-5  # of Mamba layers in Megatron-Core
CHUNK = 128  # of Mamba's scan, where Megatron-LM has no argument for it (mamba_mixer.py)
_LARGEST = 2**24  # no size of these models is near; a larger one is a mistake, or meant to hurt
_REQUIRED = object()


@dataclass(frozen=True)
class _Row:
    """A setting that both sides have."""

    ours: str  # dotted path below the model section
    field: str  # of TransformerConfig
    missing: object = _REQUIRED  # taken where neither name is there, or the value is None
    argument: str = ""  # of Megatron-LM, where it is another

    @property
    def names(self) -> tuple[str, ...]:
        return (self.argument, self.field) if self.argument else (self.field,)

    def read(self, settings: Settings) -> Any:
        found = (settings.get(name) for name in self.names)
        return next((value for value in found if value is not None), self.missing)


_ROWS = (
    _Row("hidden_size", "hidden_size"),
    _Row("norm_eps", "layernorm_epsilon", 1e-5, "norm_epsilon"),
    _Row("init_std", "init_method_std", 0.02),
    _Row("vocab_multiple", "make_vocab_size_divisible_by", 128),
    _Row("attention.heads", "num_attention_heads"),
    _Row("attention.kv_heads", "num_query_groups", None),
    _Row("attention.head_dim", "kv_channels", None),
    _Row("attention.qkv_bias", "add_qkv_bias", False),
    _Row("attention.qk_norm", "qk_layernorm", False),
    _Row("mamba.heads", "mamba_num_heads", None),
    _Row("mamba.head_dim", "mamba_head_dim", 64),
    _Row("mamba.state_size", "mamba_state_dim", 128),
    _Row("mamba.groups", "mamba_num_groups", 8),
    _Row("mamba.chunk_size", "mamba_chunk_size", CHUNK),
    _Row("mlp.intermediate_size", "ffn_hidden_size", None),
    _Row("mlp.gated", "gated_linear_unit", False, "swiglu"),
    _Row("moe.experts", "num_moe_experts", None, "num_experts"),
    _Row("moe.top_k", "moe_router_topk", 2),
    _Row("moe.intermediate_size", "moe_ffn_hidden_size", None),
    _Row("moe.shared_intermediate_size", "moe_shared_expert_intermediate_size", None),
    _Row("moe.latent_size", "moe_latent_size", None),
    _Row("moe.scaling_factor", "moe_router_topk_scaling_factor", 1.0),
    _Row("moe.bias_update_rate", "moe_router_bias_update_rate", 1e-3),
    _Row("mtp.repeated_block", "mtp_use_repeated_layer", False),
)


@dataclass(frozen=True)
class _Demand:
    """A setting of theirs that must have one value, since our models have no other.

    Attributes:
        field: of TransformerConfig.
        wanted: its value.
        missing: what a checkpoint means that does not have it; older ones lack newer settings.
        argument: of Megatron-LM, where it is another.
        letters: kinds of layers that it matters to; empty: all.
    """

    field: str
    wanted: object
    missing: object
    argument: str = ""
    letters: str = ""


_DEMANDS = (
    _Demand("add_bias_linear", False, True),
    _Demand("glu_linear_offset", 0.0, 0.0, letters="-E"),
    _Demand("activation_func_clamp_value", None, None, letters="-E"),
    _Demand("fp32_residual_connection", False, False),
    _Demand("apply_residual_connection_post_layernorm", False, False),
    _Demand("use_mup", False, False),
    _Demand("softmax_scale", None, None, letters="*"),
    _Demand("softmax_type", "vanilla", "vanilla", letters="*"),
    _Demand("window_size", None, None, letters="*"),
    _Demand("multi_latent_attention", False, False, letters="*"),
    _Demand("attention_output_gate", False, False, letters="*"),
    _Demand("moe_router_score_function", "sigmoid", "softmax", letters="E"),
    _Demand("moe_router_num_groups", None, None, letters="E"),
    _Demand("moe_router_group_topk", None, None, letters="E"),
    _Demand("moe_router_topk_limited_devices", None, None, letters="E"),
    _Demand("moe_expert_capacity_factor", None, None, letters="E"),
    _Demand("moe_apply_probs_on_input", False, False, letters="E"),
    _Demand("moe_shared_expert_gate", False, False, letters="E"),
)
_NO_GATES = _Demand("gated_linear_unit", False, False, "swiglu", "E")  # of experts, by one flag
# Of a model whose queries and keys are turned; in others the values of these are dead.
_ROTARY_DEMANDS = (
    _Demand("rotary_interleaved", False, False, letters="*"),
    _Demand("no_rope_freq", None, None, letters="*"),
    _Demand("rope_scaling", False, False, "use_rope_scaling", "*"),
    _Demand("seq_len_interpolation_factor", None, None, "rotary_seq_len_interpolation_factor", "*"),
)
_NORMS = {  # their normalization, and whether weights are stored minus 1
    NormKind.rms: ("RMSNorm", False),
    NormKind.layer_1p: ("LayerNorm", True),
}
# How each of them spells what MLPs do: switches of Megatron-LM; functions by import path, the first
# of which is written.
FUNCTIONS = {
    Activation.squared_relu: (
        "megatron.core.activations.squared_relu",
        "megatron.core.fusions.fused_bias_geglu.squared_relu",
        "nemo.collections.llm.gpt.model.ssm.NemotronHConfigBase.<lambda>",
    ),
    Activation.silu: ("torch.nn.functional.silu",),
}
_ROTARY = (("rotary_base", 10000), ("rotary_percent", 1.0))  # and what is meant without
_UNUSED = ("hidden_dropout", "attention_dropout")  # by our models, which learn without


def to_model(settings: Settings, place: object) -> Model:
    """Translate their settings into our model section; the vocabulary is left open.

    Args:
        settings: arguments, or fields.
        place: where they stand, for errors.

    Raises:
        UserError: naming every setting that is missing, senseless, or of another kind of model.
    """
    model = Model(pattern="", hidden_size=0)
    faults: list[str] = []
    try:
        pattern = _pattern(settings)
        model.pattern = str(pattern)
        faults += _foreign(settings, pattern)
    except ValueError as error:
        faults.append(str(error))
    for row in _ROWS:
        value = row.read(settings)
        faults += _senseless(row, value)
        _put(model, row.ours, value)
    if not faults:
        model.tie_embeddings = _is_tied(settings)
        model.norm = _norm(settings) or model.norm
        model.mlp.activation = _activation(settings) or model.mlp.activation
        _derive(model, settings)
        counted = CountJob(model=model)
        faults += [f"{problem}" for problem in collect(model)] or [
            *(f"{problem}" for rule in MODEL_RULES for problem in rule(counted, 1)),
            *_computed_otherwise(model),
        ]
    if faults:
        raise UserError(f"{place} is no model that is known here:\n  " + "\n  ".join(faults))
    return model


def _put(model: Model, path: str, value: Any) -> None:
    section, _, name = path.rpartition(".")
    setattr(getattr(model, section) if section else model, name, value)


def _senseless(row: _Row, value: Any) -> Iterator[str]:
    name = row.names[0]
    if value is _REQUIRED:
        yield f"{name} is missing"
    elif isinstance(row.missing, bool):
        if not isinstance(value, bool):
            yield f"{name} is {value!r}; it must be true or false"
    elif isinstance(row.missing, float):
        if not _is_number(value):
            yield f"{name} is {value!r}; it must be a number"
    elif value is not None and not (type(value) is int and 0 < value <= _LARGEST):
        yield f"{name} is {value!r}; it must be a whole number from 1 to {_LARGEST}"


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < _LARGEST


def _pattern(settings: Settings) -> Pattern:
    """Read the layers, and those of MTP from either of the ways in which they were said.

    Raises:
        ValueError: if there are none, or not as many as the settings say.
    """
    text = settings.get("hybrid_layer_pattern") or settings.get("hybrid_override_pattern")
    if not isinstance(text, str):
        raise ValueError(
            "hybrid_layer_pattern is missing: only models with a pattern of layers are converted, "
            "which Megatron-LM trains by pretrain_hybrid.py or pretrain_mamba.py"
        )
    written = parse(text.replace("|", ""))
    count = settings.get("num_layers")
    if count is not None and count != len(written.main):
        raise ValueError(f"num_layers is {count}, but the pattern has {len(written.main)} layers")
    depths = settings.get("mtp_num_layers") or 0
    if type(depths) is not int or not 0 <= depths <= len(text) + 16:
        raise ValueError(f"mtp_num_layers is {depths!r}")
    block = written.mtp or settings.get("mtp_hybrid_override_pattern")
    repeated = bool(settings.get("mtp_use_repeated_layer"))
    if written.mtp and not (
        repeated and depths
    ):  # one block may serve more depths than are written
        depths = written.mtp_depths
    if not block:
        if depths:
            raise ValueError(f"mtp_num_layers is {depths}, but no layers are given for them")
        return Pattern((written.main,))
    return parse(written.main + f"/{block}" * (max(depths, 1) if repeated else depths))


def _foreign(settings: Settings, pattern: Pattern) -> Iterator[str]:
    yield from _of_positions(settings)
    rotary = _ROTARY_DEMANDS if settings.get("position_embedding_type") == "rope" else ()
    for demand in (*_DEMANDS, _NO_GATES, *rotary):
        names = [demand.argument, demand.field]
        name = next((one for one in names if one and one in settings), demand.field)
        value = settings.get(name, demand.missing)
        if demand.letters and not set(demand.letters) & set(pattern.layers):
            continue
        if value != demand.wanted:
            yield f"{name} is {value!r}; models here have {demand.wanted!r}"
    if _norm(settings) is None:
        name, centered = _norm_settings(settings)
        yield (
            f"normalization is {name!r} and apply_layernorm_1p is {centered!r}; models here have "
            "RMSNorm without it, or LayerNorm with it"
        )
    if {"-", "E"} & set(pattern.layers) and _activation(settings) is None:
        function = settings.get("activation_func")
        said = f"activation_func is {_named(function)}" if function else "squared_relu is not set"
        yield f"{said}; models here have the square of ReLU, or SiLU (swiglu)"


def _norm_settings(settings: Settings) -> tuple[object, object]:
    centered = settings.get("layernorm_zero_centered_gamma", False)
    return (
        settings.get("normalization", "LayerNorm"),
        settings.get("apply_layernorm_1p", centered),
    )


def _norm(settings: Settings) -> NormKind | None:
    """Return the kind of norms; None for one that is not known here."""
    said = _norm_settings(settings)
    return next((kind for kind, theirs in _NORMS.items() if theirs == said), None)


def _named(function: object) -> str:
    return str(function.get("_target_")) if isinstance(function, dict) else str(function)


def _activation(settings: Settings) -> Activation | None:
    """Return what MLPs do; None for what is not known here."""
    if settings.get("squared_relu"):
        return Activation.squared_relu
    if settings.get("swiglu"):
        return Activation.silu
    named = _named(settings.get("activation_func"))
    return next((kind for kind, theirs in FUNCTIONS.items() if named in theirs), None)


def _of_positions(settings: Settings) -> Iterator[str]:
    kind = settings.get("position_embedding_type", "learned_absolute")
    if kind not in ("none", "rope"):
        yield f"position_embedding_type is {kind!r}; models here have 'none' or 'rope'"
    elif kind == "rope":
        for name, _ in _ROTARY:
            if not _is_number(value := settings.get(name, 1)):
                yield f"{name} is {value!r}; it must be a number"


def _computed_otherwise(model: Model) -> Iterator[str]:
    """Yield what Megatron-Core 0.19.2 computes in another way than its settings and we say."""
    if "M" in model.pattern and model.norm_eps != GATED_NORM_EPS:
        yield (
            f"layernorm_epsilon is {model.norm_eps}; Megatron-Core takes {GATED_NORM_EPS} in the "
            "gated norms of Mamba layers whatever it says (mamba_mixer.py 419), and models here do "
            "not"
        )
    if "E" in model.pattern and model.moe.top_k == 1:
        yield (
            "moe_router_topk is 1; Megatron-Core does not normalise the weight of a single expert "
            "(moe_utils.py 868), and models here do"
        )


def _is_tied(settings: Settings) -> bool:
    untied = settings.get("untie_embeddings_and_output_weights")
    if untied is not None:
        return not untied
    return bool(settings.get("share_embeddings_and_output_weights"))


def _derive(model: Model, settings: Settings) -> None:
    """Fill in the sizes that their side derives from others; unused sections get defaults."""
    if model.attention.kv_heads is None or settings.get("group_query_attention") is False:
        model.attention.kv_heads = model.attention.heads
    model.attention.head_dim = (
        model.attention.head_dim or model.hidden_size // model.attention.heads
    )
    if settings.get("position_embedding_type") == "rope":
        rope = model.attention.rope
        rope.theta, rope.fraction = (settings.get(name, usual) for name, usual in _ROTARY)
    model.mamba.heads = model.mamba.heads or 2 * model.hidden_size // model.mamba.head_dim
    model.mlp.intermediate_size = model.mlp.intermediate_size or 4 * model.hidden_size
    model.moe.intermediate_size = model.moe.intermediate_size or model.mlp.intermediate_size
    if not has_expert_bias(settings):
        model.moe.bias_update_rate = 0.0
    for letter, section in SECTIONS.items():
        if letter not in model.pattern:
            setattr(model, section, type(getattr(model, section))())


def has_expert_bias(settings: Settings) -> bool:
    """Tell whether the layers of experts have biases for balance."""
    return bool(settings.get("moe_router_enable_expert_bias"))


def unused(settings: Settings) -> list[str]:
    """Name the settings of training that have no counterpart here, with their values."""
    return [f"{name} {settings[name]}" for name in _UNUSED if settings.get(name)]


def vocabulary(model: Model, rows: int, vocab_size: int | None) -> None:
    """Set the vocabulary of a model so that its weights have as many rows as theirs.

    Megatron-LM pads to a multiple that depends on the number of tensor ranks.

    Args:
        model: what is changed.
        rows: of their embedding.
        vocab_size: tokens; None: as many as rows.
    """
    model.vocab_size = vocab_size or rows
    if padded_vocab_size(model.vocab_size, model.vocab_multiple) != rows:
        model.vocab_multiple = rows


def to_fields(model: Model) -> dict[str, Any]:
    """Translate a model section into fields of TransformerConfig and of the hybrid's own class.

    Raises:
        UserError: if these cannot say it.
    """
    usual, pattern = sizes_of(model), parse(model.pattern)
    if faults := list(_computed_otherwise(model)):
        raise UserError(f"this model cannot be exported: {'; '.join(faults)}")
    for layer in layers(model):
        if layer.sizes != usual:
            raise UserError(
                f"model.layers.{layer.rule} gives layer {layer.number} sizes of its own, and "
                "NVIDIA's hybrids have one size for all layers of a kind, so this model cannot be "
                "exported"
            )
    fields: dict[str, Any] = {
        row.field: reduce(getattr, row.ours.split("."), model) for row in _ROWS
    }
    if model.init_std is None:
        fields["init_method_std"] = 0.9 / model.hidden_size**0.5
    fields |= {demand.field: demand.wanted for demand in _DEMANDS}
    fields["normalization"], fields["layernorm_zero_centered_gamma"] = _NORMS[model.norm]
    fields |= _positions(model)
    if "E" not in pattern.layers:
        for name in [name for name in fields if "moe" in name]:
            del fields[name]
    else:
        fields["moe_router_enable_expert_bias"] = True  # ours always has them
        fields["moe_grouped_gemm"] = True
    return fields | {
        "hybrid_layer_pattern": str(pattern),
        "num_layers": len(pattern.main),
        "mtp_num_layers": pattern.mtp_depths or None,
        "is_hybrid_model": True,
        "share_embeddings_and_output_weights": model.tie_embeddings,
        **dict.fromkeys(_UNUSED, 0.0),
    }


def _positions(model: Model) -> dict[str, Any]:
    """Return what their fields say of positions.

    Raises:
        UserError: if they are scaled, which their hybrids do not do, whatever is set.
    """
    rope = model.attention.rope
    if rope.theta is None:
        return {"position_embedding_type": "none"}
    if rope.scaling is not RopeScaling.none:
        raise UserError(
            f"model.attention.rope.scaling is {rope.scaling.value}, and NVIDIA's hybrids turn "
            "queries and keys without any (HybridModel of Megatron-Core 0.19.2), so this model "
            "cannot be exported"
        )
    theta = int(rope.theta) if rope.theta.is_integer() else rope.theta
    values = (theta, rope.fraction)
    said = {name: value for (name, _), value in zip(_ROTARY, values, strict=True)}
    return {"position_embedding_type": "rope", "rotary_interleaved": False, **said}


def _switches(model: Model) -> dict[str, bool]:
    """Return the arguments of Megatron-LM that say what MLPs do.

    Raises:
        UserError: if none does: SiLU is there with a gate alone, and the gate with SiLU alone.
    """
    mlp = model.mlp
    if "-" in model.pattern and mlp.gated is not (mlp.activation is Activation.silu):
        raise UserError(
            f"model.mlp.activation is {mlp.activation.value} and model.mlp.gated "
            f"{str(mlp.gated).lower()}, and Megatron-LM has gates with SiLU alone (--swiglu), so "
            "this model cannot be exported for it; format=bridge can say it"
        )
    return {"squared_relu": mlp.activation is Activation.squared_relu}


def to_arguments(model: Model) -> dict[str, Any]:
    """Translate a model section into arguments of Megatron-LM, under former names too.

    Raises:
        UserError: if these cannot say it.
    """
    fields = to_fields(model)
    renamed = [(row.field, row.argument) for row in _ROWS]
    renamed += [(demand.field, demand.argument) for demand in _DEMANDS]
    arguments = {new: fields[old] for old, new in renamed if new and old in fields}
    return (
        fields
        | arguments
        | {
            **_switches(model),
            "apply_layernorm_1p": fields["layernorm_zero_centered_gamma"],
            "group_query_attention": True,
            "add_position_embedding": False,
            "use_rotary_position_embeddings": model.attention.rope.theta is not None,
            "untie_embeddings_and_output_weights": not model.tie_embeddings,
        }
    )
