"""The named axes of a model, and dimensions of tensors as products of them."""

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from hybrid_train.schema.model import Model, NormKind


class Axis(enum.Enum):
    """What can be counted in a model; the value is the setting that says how many there are."""

    vocab = "vocab_size"
    hidden = "hidden_size"
    heads = "attention.heads"
    kv_groups = "attention.kv_heads"
    head_dim = "attention.head_dim"
    ssm_heads = "mamba.heads"
    ssm_head_dim = "mamba.head_dim"
    ssm_groups = "mamba.groups"
    ssm_state = "mamba.state_size"
    ffn = "mlp.intermediate_size"
    experts = "moe.experts"
    expert_ffn = "moe.intermediate_size"
    shared_ffn = "moe.shared_intermediate_size"
    latent = "moe.latent_size"

    @property
    def setting(self) -> str:
        """Path of the setting in a job."""
        return f"model.{self.value}"


class Sizes(NamedTuple):
    """How many there are along each axis, in one layer; 0 for what a layer does not have."""

    vocab: int
    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    ssm_heads: int
    ssm_head_dim: int
    ssm_groups: int
    ssm_state: int
    ffn: int
    experts: int
    expert_ffn: int
    shared_ffn: int
    latent: int
    top_k: int = 0  # experts that a token meets
    moves_bias: int = 0  # 1 if the biases of the experts ever change
    # 1 where a model has them: gates of MLP layers, biases and norms of attention, biases of norms.
    gated: int = 0
    qkv_bias: int = 0
    qk_norm: int = 0
    norm_bias: int = 0

    def along(self, axis: Axis) -> int:
        """Return how many there are along an axis."""
        return int(getattr(self, axis.name))


_read_axes = attrgetter(*(axis.value for axis in Axis))


def sizes_of(model: Model, vocab_rows: int = 0) -> Sizes:
    """Return the sizes that hold for a whole model.

    Args:
        model: the model.
        vocab_rows: rows of embedding and head as they are stored.
    """
    _, *others = (value or 0 for value in _read_axes(model))
    moe, attention = model.moe, model.attention
    has = (model.mlp.gated, attention.qkv_bias, attention.qk_norm, model.norm is NormKind.layer_1p)
    moves_bias = moe.bias_update_rate > 0
    return Sizes._make((vocab_rows, *others, moe.top_k, int(moves_bias), *map(int, has)))


@dataclass(frozen=True)
class Part:
    """Rows that belong together: a product of axes in order, times a fixed number."""

    axes: tuple[Axis, ...]
    name: str = ""
    times: int = 1

    def size(self, sizes: Sizes) -> int:
        """Count the rows in all."""
        return self.times * math.prod(map(sizes.along, self.axes))


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: parts, one behind the other.

    Attributes:
        parts: of the dimension; mostly one.
        by: the axis along which parts alternate: each is cut into as many runs, and the first runs
            of all parts come first. The rows of queries, keys and values alternate by `kv_groups`.
        free: the axis whose setting changes the size and breaks no other rule.
        words: what it is, where the axes do not say it.
        apart: whether a checkpoint has a tensor of its own for each part.
    """

    parts: tuple[Part, ...]
    by: Axis | None = None
    free: Axis | None = None
    words: str = ""
    apart: bool = False

    def size(self, sizes: Sizes) -> int:
        """Count the elements along the dimension."""
        return sum(part.size(sizes) for part in self.parts)

    def runs(self, sizes: Sizes) -> Iterator[tuple[Part, int, int]]:
        """Yield the parts in the order of their rows, each with its run and the rows of that."""
        number = sizes.along(self.by) if self.by else 1
        for run in range(number):
            for part in self.parts:
                yield part, run, part.size(sizes) // number

    @property
    def grows_with(self) -> Axis | None:
        """The axis to change for another size; None for a fixed width."""
        return self.free or next(iter(self.parts[0].axes), None)

    def __str__(self) -> str:
        if self.words:
            return self.words
        (part,) = self.parts
        first, *others = (axis.value for axis in part.axes)
        named = " x ".join([first, *(name.rpartition(".")[2] for name in others)])
        return named if part.times == 1 else f"{part.times} x {named}"


def dim(*axes: Axis, times: int = 1, free: Axis | None = None) -> Dim:
    """Return a dimension of one part."""
    return Dim((Part(axes, times=times),), free=free)


def width(number: int) -> Dim:
    """Return a dimension that is the same in every model."""
    return Dim((Part((), times=number),))
