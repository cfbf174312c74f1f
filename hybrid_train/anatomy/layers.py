"""The layers of a model, each with its own sizes, and the tensors that a checkpoint holds."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hybrid_train.anatomy.axes import Sizes, sizes_of
from hybrid_train.anatomy.kinds import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    KINDS,
    MTP_BLOCK,
    LayerKind,
    Parameter,
    parameters_of,
)
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        letter: of its kind.
        number: from 1, of the main layers or of the block.
        depth: 0 for the main layers, else the MTP block, from 1.
        sizes: its own.
    """

    letter: str
    number: int
    depth: int
    sizes: Sizes

    @property
    def kind(self) -> LayerKind:
        """What it is."""
        return KINDS[self.letter]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its tensors."""
        return parameters_of(self.letter, self.sizes)

    @property
    def prefix(self) -> str:
        """What stands before the names of its tensors in a checkpoint."""
        if self.depth == 0:
            return f"decoder.layers.{self.number - 1}."
        return f"{block_prefix(self.depth)}mtp_model_layer.layers.{self.number - 1}."


class Shape(NamedTuple):
    """All that the layers of a model depend on."""

    pattern: str
    repeated_block: bool
    sizes: Sizes


def shape_of(model: Model) -> Shape:
    """Return what the layers of a model depend on, to know them again."""
    return Shape(model.pattern, model.mtp.repeated_block, sizes_of(model))


def layers(model: Model) -> tuple[Layer, ...]:
    """Return the main layers, then those of each MTP block that has weights of its own."""
    return layers_of_shape(shape_of(model))


@lru_cache(maxsize=256)  # the checks ask again and again
def layers_of_shape(shape: Shape) -> tuple[Layer, ...]:
    """Return the layers of a model, by what they depend on."""
    pattern = parse(shape.pattern)
    found = [
        Layer(letter, number, 0, shape.sizes) for number, letter in enumerate(pattern.main, start=1)
    ]
    blocks = min(pattern.mtp_depths, 1) if shape.repeated_block else pattern.mtp_depths
    for depth in range(1, blocks + 1):
        found += [
            Layer(letter, number, depth, shape.sizes)
            for number, letter in enumerate(pattern.mtp, start=1)
        ]
    return tuple(found)


def main_layers(model: Model) -> list[Layer]:
    """Return the layers that are in no MTP block."""
    return [layer for layer in layers(model) if layer.depth == 0]


def block_layers(model: Model) -> list[Layer]:
    """Return the layers of one MTP block; blocks are alike."""
    return [layer for layer in layers(model) if layer.depth == 1]


def grouped(model: Model, depth: int) -> tuple[tuple[Layer, int], ...]:
    """Return one layer of each kind and sizes among those of a depth, and how many there are."""
    return _grouped(shape_of(model), depth)


@lru_cache(maxsize=256)
def _grouped(shape: Shape, depth: int) -> tuple[tuple[Layer, int], ...]:
    here = [layer for layer in layers_of_shape(shape) if layer.depth == depth]
    numbers = Counter((layer.letter, layer.sizes) for layer in here)
    firsts = {(layer.letter, layer.sizes): layer for layer in reversed(here)}
    return tuple((firsts[key], number) for key, number in numbers.items())


def mtp_blocks(model: Model) -> int:
    """Return how many MTP blocks have weights of their own."""
    return layers(model)[-1].depth


def distinct(model: Model) -> tuple[Layer, ...]:
    """Return one layer of each kind and sizes, in order of the kinds."""
    return _distinct(shape_of(model))


@lru_cache(maxsize=256)
def _distinct(shape: Shape) -> tuple[Layer, ...]:
    found = {(layer.letter, layer.sizes): layer for layer in reversed(layers_of_shape(shape))}
    order = list(KINDS)
    return tuple(sorted(found.values(), key=lambda one: (order.index(one.letter), one.number)))


def block_prefix(depth: int) -> str:
    """Return what stands before the names of the tensors of an MTP block, counted from 1."""
    return f"mtp.layers.{depth - 1}."


def stored(model: Model) -> Iterator[tuple[str, Parameter]]:
    """Yield the key of every tensor that a checkpoint holds; packed ones by their common name."""
    for layer in layers(model):
        for one in layer.parameters:
            yield layer.prefix + one.stored, one
    for one in (EMBEDDING, FINAL_NORM, HEAD):
        yield one.stored, one
    for depth in range(1, mtp_blocks(model) + 1):
        for one in MTP_BLOCK:
            yield block_prefix(depth) + one.stored, one
