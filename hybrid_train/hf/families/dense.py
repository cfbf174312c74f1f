"""What dense Transformers share: blocks of attention and MLP, `*-` here, one index of theirs.

A family states what its class has and what the class takes where a config leaves a key out
(transformers 5.23, models/*/configuration_*.py); everything else is refused by name.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from hybrid_train.hf.family import LENGTH, Family
from hybrid_train.hf.fields import Field, read_fields, senseless, written_fields
from hybrid_train.hf.names import Spelling, Stored, table
from hybrid_train.hf.rope_keys import KEYS, ORIGINAL, RopeReader, renamed, written
from hybrid_train.schema.model import Activation, Model, NormKind, RopeScaling
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError, collect

HEAD_DIM = ("head_dim", "kv_channels")
TENSORS: Mapping[str, str] = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "self_attention.linear_qkv.weight": "self_attn.{part}_proj.weight",
    "self_attention.linear_qkv.bias": "self_attn.{part}_proj.bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "post_attention_layernorm.bias",
    "mlp.linear_fc1.weight": "mlp.{part}_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_ALWAYS = ("head_dim", "num_key_value_heads")  # in every export
_ACTIVATIONS = {"silu": Activation.silu, "swish": Activation.silu, "relu2": Activation.squared_relu}
_BIASES = ("attention_bias", "mlp_bias")
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_FULL = "full_attention"
_MOST_BLOCKS = 4096
_log = logging.getLogger(__name__)


class Dense(Family):
    """A dense Transformer.

    Attributes:
        defaults: what its class takes where a config leaves a key out.
        says: keys that decide nothing here, but that its class reads.
        norm_key: the key of the eps of its norms.
        norm: their kind.
        activation: of its MLPs.
        gated: whether these have gates.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normalised.
        partial: whether a share of each head may be turned; else all of it.
        scalings: of rotary embeddings.
    """

    spelling = Spelling("model.embed_tokens.weight", "model.layers.", TENSORS, "model.norm")
    defaults: ClassVar[Mapping[str, Any]]
    says: ClassVar[Mapping[str, Any]] = {}
    norm_key: ClassVar[str] = "rms_norm_eps"
    norm: ClassVar[NormKind] = NormKind.rms
    activation: ClassVar[Activation] = Activation.silu
    gated: ClassVar[bool] = True
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    partial: ClassVar[bool] = False
    scalings: ClassVar[tuple[RopeScaling, ...]] = tuple(RopeScaling)

    @property
    def length(self) -> int:  # type: ignore[override]
        """Positions, where a config leaves them out."""
        return int(self.defaults[LENGTH])

    @property
    def fields(self) -> tuple[Field, ...]:
        """Sizes that both sides have."""
        of = self.defaults.get
        return (
            Field("hidden_size", "hidden_size", of("hidden_size")),
            Field("vocab_size", "vocab_size", of("vocab_size")),
            Field("norm_eps", self.norm_key, of(self.norm_key)),
            Field("init_std", "initializer_range", of("initializer_range", 0.02)),
            Field("tie_embeddings", "tie_word_embeddings", False),
            Field("attention.heads", "num_attention_heads", of("num_attention_heads")),
            Field("attention.kv_heads", "num_key_value_heads", of("num_key_value_heads")),
            Field("attention.head_dim", HEAD_DIM[0], of(HEAD_DIM[0]), HEAD_DIM[1:]),
            Field("mlp.intermediate_size", "intermediate_size", of("intermediate_size")),
        )

    def to_model(self, config: Mapping[str, Any], path: Path) -> Model:
        model = Model(pattern="", hidden_size=0, norm=self.norm)
        faults = [*read_fields(self.fields, config, model), *self._foreign(config)]
        attention, mlp = model.attention, model.mlp
        attention.qkv_bias, attention.qk_norm = self.qkv_bias, self.qk_norm
        mlp.activation, mlp.gated = self.activation, self.gated
        faults += senseless(LENGTH, config.get(LENGTH), self.length)
        if not faults:
            faults += self._fill_in(config, model)
        if not faults:
            faults += self._read_layers(config, model)
            reader = RopeReader(*self._rope_keys(config))
            attention.rope = reader.read(attention.head_dim, config.get(LENGTH) or self.length)
            faults += [*reader.faults, *(f"{problem}" for problem in collect(model))]
        if not faults:
            faults += self.refusals(model)
        if faults:
            raise UserError(
                f"{path} does not describe a model of the family {self.model_type} that can be "
                "computed here:\n  " + "\n  ".join(faults)
            )
        return model

    def _foreign(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Yield what no model of the family has, or what cannot be computed here."""
        said = config.get("hidden_act", self.defaults["hidden_act"])
        if _ACTIVATIONS.get(str(said)) is not self.activation:
            yield f"hidden_act is {said!r}; it must be {self.defaults['hidden_act']!r}"
        for key in _BIASES:
            if config.get(key):
                yield f"{key} is {config[key]!r}; {self.architecture} is known without such biases"
        channels = {config[key] for key in HEAD_DIM if type(config.get(key)) is int}
        if len(channels) > 1:
            yield f"head_dim is {config['head_dim']}, and kv_channels {config['kv_channels']}"
        yield from self._windows(config)

    def _windows(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Yield the sliding windows that are shorter than the positions of a model."""
        length, kinds = config.get(LENGTH) or self.length, config.get("layer_types")
        if type(length) is not int:
            return  # said elsewhere
        window = config.get("sliding_window", self.defaults.get("sliding_window"))
        if not config.get("use_sliding_window", self.defaults.get("use_sliding_window", True)):
            window = None
        known = (_FULL, "sliding_attention")
        if kinds is not None and not (
            isinstance(kinds, list) and all(one in known for one in kinds)
        ):
            yield f"layer_types has other words than {_FULL} and sliding_attention: {kinds!r}"
        elif window is not None and (type(window) is not int or window < length):
            yield (
                f"sliding_window is {window!r}, fewer than the {length} positions of {LENGTH}; "
                "attention without a window is computed here"
            )

    def _fill_in(self, config: Mapping[str, Any], model: Model) -> Iterator[str]:
        """Set what follows from other sizes where a config has null; yield what does not fit."""
        attention, heads = model.attention, model.attention.heads
        if not heads:
            yield f"num_attention_heads is {heads}; it must be at least 1"
            return
        if config.get("num_key_value_heads", 0) is None or attention.kv_heads is None:
            attention.kv_heads = heads
        if attention.head_dim is None:
            attention.head_dim, rest = divmod(model.hidden_size, heads)
            if rest:
                yield (
                    f"head_dim is missing, and hidden_size, {model.hidden_size}, is no multiple "
                    f"of num_attention_heads, {heads}"
                )
        if not attention.kv_heads or heads % attention.kv_heads:
            yield (
                f"num_key_value_heads is {attention.kv_heads}; it must divide the number of "
                f"heads, {heads}"
            )

    def _read_layers(self, config: Mapping[str, Any], model: Model) -> Iterator[str]:
        """Set the pattern of a model and the sizes of its layers; yield what is senseless."""
        blocks = config.get("num_hidden_layers", self.defaults["num_hidden_layers"])
        if type(blocks) is not int or not 0 < blocks <= _MOST_BLOCKS:
            yield f"num_hidden_layers is {blocks!r}; it must be a whole number up to {_MOST_BLOCKS}"
            blocks = 1
        model.pattern = "*-" * blocks

    def _rope_keys(self, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the config, and what the class takes for keys of positions that it lacks."""
        share = self.defaults.get("partial_rotary_factor", 1.0)
        return config, {"rope_theta": 10000.0, "partial_rotary_factor": share}

    def refusals(self, model: Model) -> Iterator[str]:
        yield from self._pattern_refusals(model)
        attention, mlp, rope = model.attention, model.mlp, model.attention.rope
        if model.norm is not self.norm:
            yield f"model.norm is {model.norm.value}, not {self.norm.value}"
        if (mlp.activation, mlp.gated) != (self.activation, self.gated):
            yield (
                f"model.mlp.activation is {mlp.activation.value}, gated {_word(mlp.gated)}, not "
                f"{self.activation.value}, gated {_word(self.gated)}"
            )
        for name in ("qkv_bias", "qk_norm"):
            if (has := getattr(attention, name)) != getattr(self, name):
                yield f"model.attention.{name} is {_word(has)}, not {_word(not has)}"
        if rope.theta is None:
            yield "model.attention.rope.theta is null: it has positions"
            return
        if not self.partial and rope.turned(attention.head_dim) != attention.head_dim:
            yield f"model.attention.rope.fraction is {rope.fraction:g}: it turns whole heads"
        if rope.scaling not in self.scalings:
            yield f"model.attention.rope.scaling is {rope.scaling.value}: it has no such scaling"

    def _pattern_refusals(self, model: Model) -> Iterator[str]:
        if not re.fullmatch(r"(\*-)+", str(parse(model.pattern))):
            yield f"model.pattern is {model.pattern}: it has blocks *- alone"

    def to_config(
        self, model: Model, *, vocab_size: int, length: int, dtype: str,
        token_ids: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        rope = model.attention.rope
        is_long = rope.scaling is RopeScaling.longrope
        config = {
            "architectures": [self.architecture],
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "hidden_act": self.defaults["hidden_act"],
            "model_type": self.model_type,
            "use_cache": True,
            **self.says,
            **written_fields(self.fields, model),
            **written(rope, partial=self.partial, short=ORIGINAL in self.defaults),
            **self._layer_keys(model),
            **token_ids,
            "vocab_size": vocab_size,
            # Cosines of longrope are scaled by the ratio of this length and the original one.
            LENGTH: rope.maximum_length if is_long else length,
            "torch_dtype": dtype,
        }
        return dict(sorted(config.items()))

    def _layer_keys(self, model: Model) -> dict[str, Any]:
        """Return the keys of the layers."""
        return {"num_hidden_layers": len(parse(model.pattern).main) // 2}

    def computation_keys(self, model: Model) -> set[str]:
        fields = {key for field in self.fields for key in (field.theirs, *field.older)}
        is_long = model.attention.rope.scaling is RopeScaling.longrope
        return {
            *fields, *KEYS, *_BIASES, *_WINDOW_KEYS, "hidden_act", *self._layer_keys(model),
            *([LENGTH] if is_long else ()),
        }  # fmt: skip

    def table(self, model: Model, vocab_size: int) -> Iterator[Stored]:
        numbers = [n // 2 for n in range(len(parse(model.pattern).main))]
        return table(model, vocab_size, self.spelling, numbers)

    def released(self, name: str) -> str | None:
        """Leave out the angles that old files hold; they follow from the config."""
        return None if name.endswith(".rotary_emb.inv_freq") else name

    def as_trained(self, said: Mapping[str, Any], *, length: int, dtype: str) -> dict[str, Any]:
        """Return a config trained for longer texts; the length of longrope is part of the model."""
        model = self.to_model(said, Path("config.json"))
        config = super().as_trained(renamed(said), length=length, dtype=dtype)
        if model.attention.rope.scaling is RopeScaling.longrope:
            config[LENGTH] = said.get(LENGTH, config.get(LENGTH))
            if length > model.attention.rope.maximum_length:
                _log.warning(
                    "the model was trained on %d tokens a row, and %s stays %s: longrope scales "
                    "by it", length, LENGTH, config[LENGTH],
                )  # fmt: skip
        window = config.get("sliding_window")
        is_on = "use_sliding_window" not in self.defaults
        if is_on and window is not None and window < (config.get(LENGTH) or self.length):
            config["sliding_window"] = None  # there was none, as long as the model was
        # transformers 5.23 fills neither in for every family.
        made = written_fields(self.fields, model)
        return config | {key: made[key] for key in _ALWAYS if key in made}


def _word(flag: bool) -> str:
    return str(flag).lower()
