"""The model: layer pattern and the sizes of each kind of layer."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.config.problems import Problem, at_least


@dataclass(kw_only=True)
class Attention:
    """Sizes of the attention layers (*). Grouped queries, no positional embedding, no bias."""

    heads: int = 32  # query heads
    kv_heads: int = 8  # key and value heads; each serves heads / kv_heads query heads
    head_dim: int = 128

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(1, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)


@dataclass(kw_only=True)
class Mamba:
    """Sizes of the Mamba-2 layers (M). Inner width is heads * head_dim."""

    heads: int = 128
    head_dim: int = 64
    state_size: int = 128  # N: state per channel
    groups: int = 8  # heads of one group share B and C
    chunk_size: int = 128  # scan chunk; changes speed, not the result

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(
            1,
            heads=self.heads,
            head_dim=self.head_dim,
            state_size=self.state_size,
            groups=self.groups,
            chunk_size=self.chunk_size,
        )


@dataclass(kw_only=True)
class Mlp:
    """Sizes of the MLP layers (-): down(relu(up(x))^2)."""

    intermediate_size: int = 21504

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(1, intermediate_size=self.intermediate_size)


@dataclass(kw_only=True)
class Moe:
    """Sizes and routing of the expert layers (E). Sigmoid scores, no token is dropped."""

    experts: int = 128
    top_k: int = 6  # experts per token
    intermediate_size: int = 1856  # inner width of one routed expert
    shared_intermediate_size: int | None = None  # inner width of the shared expert; None: no such
    latent_size: int | None = None  # LatentMoE: routed experts work in this width; None: hidden
    scaling_factor: float = 1.0  # multiplies the normalised weights of the chosen experts
    bias_update_rate: float = 1e-3  # step of the expert bias after each update (0: no bias)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(
            1,
            experts=self.experts,
            top_k=self.top_k,
            intermediate_size=self.intermediate_size,
            shared_intermediate_size=self.shared_intermediate_size,
            latent_size=self.latent_size,
        )
        yield from at_least(0, bias_update_rate=self.bias_update_rate)
        if self.top_k > self.experts:
            yield Problem(
                "top_k", self.top_k, f"must not exceed experts ({self.experts})", self.experts
            )


@dataclass(kw_only=True)
class Mtp:
    """Multi-token prediction; depth and layers are the parts of the pattern after `/`."""

    repeated_block: bool = True  # one block of weights serves every depth


@dataclass(kw_only=True)
class Model:
    """A hybrid language model. The pattern has one letter per layer: M * - E."""

    pattern: str = MISSING  # "MEM*M-/*E": three layer kinds, then one MTP depth of two layers
    hidden_size: int = MISSING
    vocab_size: int | None = None  # None: that of the tokenizer
    vocab_multiple: int = 128  # embedding and head are padded to a multiple of this
    norm_eps: float = 1e-5
    init_std: float | None = None  # None: 0.9 / sqrt(hidden_size)
    tie_embeddings: bool = False
    attention: Attention = field(default_factory=Attention)
    mamba: Mamba = field(default_factory=Mamba)
    mlp: Mlp = field(default_factory=Mlp)
    moe: Moe = field(default_factory=Moe)
    mtp: Mtp = field(default_factory=Mtp)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(
            1,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            vocab_multiple=self.vocab_multiple,
        )
