"""The model: layer pattern and the sizes of each kind of layer."""

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar

from omegaconf import MISSING

from hybrid_train.schema.layer_ranges import RULE, is_range
from hybrid_train.schema.limits import Factor, Range, Share, Size, Vocabulary
from hybrid_train.schema.problems import Problem


class NormKind(enum.Enum):
    """How hidden states are normalised in front of a layer, and behind the last one."""

    rms = "rms"  # RMSNorm: by the root mean square, no bias
    layer_1p = "layer_1p"  # LayerNorm with a bias; its weight is stored minus 1


class Activation(enum.Enum):
    """What MLP layers do between their linears."""

    squared_relu = "squared_relu"
    silu = "silu"


class RopeScaling(enum.Enum):
    """How the angles of a rotary embedding are changed for texts longer than it began with."""

    none = "none"
    llama3 = "llama3"  # slow channels turn slower by a factor, fast ones as before
    longrope = "longrope"  # each pair of channels by a factor of its own, others in long rows


_Factors = list[Annotated[float, Range(1e-3, 1e6)]]


@dataclass(kw_only=True)
class Rope:
    """Rotary position embedding of queries and keys; there is one where theta is given."""

    theta: Annotated[float, Range(1, 1e12)] | None = None  # base of the angles; None: no positions
    fraction: Annotated[float, Range(1e-3, 1)] = 1.0  # of the channels of a head that are turned
    scaling: RopeScaling = RopeScaling.none
    original_length: Size = 8192  # tokens of a row before it was scaled
    # Of llama3 (arXiv:2407.21783; the formula is in ops/rope.py).
    factor: Annotated[float, Range(1, 1e6)] = 8.0  # llama3: by which slow channels turn slower
    low_frequency_factor: Annotated[float, Range(1e-3, 1e6)] = 1.0  # slow: turns in that length
    high_frequency_factor: Annotated[float, Range(1e-3, 1e6)] = 4.0  # fast: turns in that length
    # Of longrope (arXiv:2402.13753): a factor for each pair of channels that is turned.
    maximum_length: Size = 131072  # longrope: tokens of the longest row
    short_factors: _Factors = field(default_factory=list)  # of rows up to original_length
    long_factors: _Factors = field(default_factory=list)  # of longer rows

    def turned(self, head_dim: int) -> int:
        """Return how many channels of a head are turned."""
        return int(self.fraction * head_dim)

    @property
    def magnitude(self) -> float:
        """By what cosines and sines are multiplied: 1 but for longrope.

        There it is sqrt(1 + ln(maximum / original) / ln(original)), at every length (Ding et al.,
        arXiv:2402.13753, and the released code of Phi-4-mini).
        """
        factor = self.maximum_length / self.original_length
        if self.scaling is not RopeScaling.longrope or factor <= 1 or self.original_length <= 1:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(self.original_length))

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if self.scaling is RopeScaling.llama3 and low >= high:
            yield Problem(
                "low_frequency_factor", low, f"must be below high_frequency_factor ({high})"
            )
        if self.scaling is RopeScaling.longrope and self.maximum_length < self.original_length:
            yield Problem(
                "maximum_length", self.maximum_length,
                f"must be at least original_length ({self.original_length})", self.original_length,
            )  # fmt: skip
        if self.scaling is not RopeScaling.none and self.theta is None:
            yield Problem(
                "scaling", self.scaling.value, "has nothing to scale without theta", "none"
            )


@dataclass(kw_only=True)
class Attention:
    """Sizes of the attention layers (*). Grouped queries; positions and biases where asked for."""

    letter: ClassVar[str] = "*"  # in the pattern
    words: ClassVar[str] = "attention"
    heads: Size = 32  # query heads
    kv_heads: Size = 8  # key and value heads; each serves heads / kv_heads query heads
    head_dim: Size = 128
    rope: Rope = field(default_factory=Rope)
    qkv_bias: bool = False  # of queries, keys and values
    qk_norm: bool = False  # RMSNorm over each head of queries and keys, before they are turned


@dataclass(kw_only=True)
class Mamba:
    """Sizes of the Mamba-2 layers (M). Inner width is heads * head_dim."""

    letter: ClassVar[str] = "M"
    words: ClassVar[str] = "Mamba-2"
    heads: Size = 128
    head_dim: Size = 64
    state_size: Size = 128  # N: state per channel
    groups: Size = 8  # heads of one group share B and C
    chunk_size: Size = 128  # scan chunk; changes speed, not the result


@dataclass(kw_only=True)
class Mlp:
    """Sizes of the MLP layers (-): down(act(up(x))), gated down(act(gate(x)) * up(x))."""

    letter: ClassVar[str] = "-"
    words: ClassVar[str] = "MLP"
    intermediate_size: Size = 21504
    activation: Activation = Activation.squared_relu
    gated: bool = False


@dataclass(kw_only=True)
class Moe:
    """Sizes and routing of the expert layers (E). Sigmoid scores, no token is dropped."""

    letter: ClassVar[str] = "E"
    words: ClassVar[str] = "experts"
    experts: Size = 128
    top_k: Size = 6  # experts per token
    intermediate_size: Size = 1856  # inner width of one routed expert
    shared_intermediate_size: Size | None = None  # inner width of the shared expert; None: no such
    latent_size: Size | None = None  # LatentMoE: routed experts work in this width; None: hidden
    scaling_factor: Factor = 1.0  # multiplies the normalised weights of the chosen experts
    bias_update_rate: Share = 1e-3  # step of the expert bias after each update (0: no bias)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if self.top_k > self.experts:
            yield Problem(
                "top_k", self.top_k, f"must not exceed experts ({self.experts})", self.experts
            )


@dataclass(kw_only=True)
class Mtp:
    """Multi-token prediction; depth and layers are the parts of the pattern after `/`."""

    repeated_block: bool = True  # one block of weights serves every depth


@dataclass(kw_only=True)
class AttentionSizes:
    """Sizes of some attention layers; null: as in the others."""

    heads: Size | None = None
    kv_heads: Size | None = None


@dataclass(kw_only=True)
class MambaSizes:
    """Sizes of some Mamba layers; null: as in the others."""

    heads: Size | None = None
    head_dim: Size | None = None


@dataclass(kw_only=True)
class MlpSizes:
    """Sizes of some MLP layers; null: as in the others."""

    intermediate_size: Size | None = None


@dataclass(kw_only=True)
class MoeSizes:
    """Sizes of some expert layers; null: as in the others."""

    experts: Size | None = None
    intermediate_size: Size | None = None
    shared_intermediate_size: Size | None = None


@dataclass(kw_only=True)
class LayerRule:
    """Layers with sizes of their own; the first rule with sizes for a kind of layer holds."""

    layers: str = "all"  # "first 2", "last 15%", "7", "3-9"; of the main layers, from 1
    attention: AttentionSizes = field(default_factory=AttentionSizes)
    mamba: MambaSizes = field(default_factory=MambaSizes)
    mlp: MlpSizes = field(default_factory=MlpSizes)
    moe: MoeSizes = field(default_factory=MoeSizes)

    @property
    def given(self) -> dict[str, int]:
        """The sizes, by their names in the model: "mlp.intermediate_size"."""
        sections = {name: getattr(self, name) for name in SECTIONS.values() if hasattr(self, name)}
        return {
            f"{name}.{one.name}": getattr(section, one.name)
            for name, section in sections.items()
            for one in fields(section)
            if getattr(section, one.name) is not None
        }

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if not is_range(self.layers):
            yield Problem("layers", self.layers, RULE, "all")

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.given.items())
        return f"{self.layers.strip()}: {sizes or 'no size'}"


@dataclass(kw_only=True)
class Model:
    """A language model. The pattern has one letter per layer: M * - E; a Transformer is *-*-*-."""

    pattern: str = MISSING  # "MEM*M-/*E": three layer kinds, then one MTP depth of two layers
    hidden_size: Size = MISSING
    vocab_size: Vocabulary | None = None  # None: that of the tokenizer
    vocab_multiple: Size = 128  # embedding and head are padded to a multiple of this
    norm: NormKind = NormKind.rms
    norm_eps: Annotated[float, Range(1e-12, 1)] = 1e-5
    init_std: Annotated[float, Range(1e-6, 10)] | None = None  # None: 0.9 / sqrt(hidden_size)
    tie_embeddings: bool = False
    attention: Attention = field(default_factory=Attention)
    mamba: Mamba = field(default_factory=Mamba)
    mlp: Mlp = field(default_factory=Mlp)
    moe: Moe = field(default_factory=Moe)
    mtp: Mtp = field(default_factory=Mtp)
    layers: list[LayerRule] = field(default_factory=list)  # sizes that differ from layer to layer


# A kind of layer is a section of the model with a letter of its own.
LAYER_KINDS = (Mamba, Attention, Mlp, Moe)
SECTIONS = {  # letter -> name of the section
    kind.letter: one.name for kind in LAYER_KINDS for one in fields(Model) if one.type is kind
}
