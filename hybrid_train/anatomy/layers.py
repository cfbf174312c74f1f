"""The layers of a model, each with its own sizes, and the tensors that a checkpoint holds."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hybrid_train.anatomy.axes import Axis, Sizes, sizes_of
from hybrid_train.anatomy.kinds import (
    EMBEDDING,
    HEAD,
    KINDS,
    LayerKind,
    Parameter,
    final_norm,
    mtp_block,
    parameters_of,
)
from hybrid_train.schema.layer_ranges import layers_of
from hybrid_train.schema.model import SECTIONS, Model
from hybrid_train.schema.pattern import parse


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        letter: of its kind.
        number: from 1, of the main layers or of the block.
        depth: 0 for the main layers, else the MTP block, from 1.
        sizes: its own.
        rule: number of the rule of `model.layers` that has sizes for it, from 0; None for none.
        given: names of the sizes that the rule gives.
    """

    letter: str
    number: int
    depth: int
    sizes: Sizes
    rule: int | None = None
    given: frozenset[str] = frozenset()

    @property
    def kind(self) -> LayerKind:
        """What it is."""
        return KINDS[self.letter]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its tensors."""
        return parameters_of(self.letter, self.sizes)

    def setting(self, axis: Axis) -> str:
        """Return the path of the setting that says how many there are along an axis."""
        if axis.value in self.given:
            return f"model.layers.{self.rule}.{axis.value}"
        return axis.setting

    @property
    def prefix(self) -> str:
        """What stands before the names of its tensors in a checkpoint."""
        if self.depth == 0:
            return f"decoder.layers.{self.number - 1}."
        return f"{block_prefix(self.depth)}mtp_model_layer.layers.{self.number - 1}."


_Rule = tuple[str, tuple[tuple[str, int], ...]]  # layers, and their sizes by name


class Shape(NamedTuple):
    """All that the layers of a model depend on."""

    pattern: str
    repeated_block: bool
    sizes: Sizes
    rules: tuple[_Rule, ...] = ()


def shape_of(model: Model) -> Shape:
    """Return what the layers of a model depend on, to know them again."""
    rules = tuple((rule.layers, tuple(rule.given.items())) for rule in model.layers)
    return Shape(model.pattern, model.mtp.repeated_block, sizes_of(model), rules)


def layers(model: Model) -> tuple[Layer, ...]:
    """Return the main layers, then those of each MTP block that has weights of its own."""
    return layers_of_shape(shape_of(model))


@lru_cache(maxsize=256)  # the checks ask again and again
def layers_of_shape(shape: Shape) -> tuple[Layer, ...]:
    """Return the layers of a model, by what they depend on."""
    pattern = parse(shape.pattern)
    blocks = min(pattern.mtp_depths, 1) if shape.repeated_block else pattern.mtp_depths
    places = [(0, number, letter) for number, letter in enumerate(pattern.main, start=1)]
    for depth in range(1, blocks + 1):
        places += [(depth, number, letter) for number, letter in enumerate(pattern.mtp, start=1)]
    ranges = [layers_of(text, len(pattern.main)) for text, _ in shape.rules]
    return tuple(_layer(shape, ranges, *place) for place in places)


def _layer(shape: Shape, ranges: list[range], depth: int, number: int, letter: str) -> Layer:
    """Return one layer with the sizes of the first rule that has any for it."""
    section = f"{SECTIONS[letter]}."
    for rule, (text, given) in enumerate(shape.rules):
        # Only "all" reaches into MTP blocks, as of precision.exceptions.
        in_range = number in ranges[rule] if depth == 0 else text.strip() == "all"
        own = {name: size for name, size in given if name.startswith(section)}
        if in_range and own:
            sizes = shape.sizes._replace(**{Axis(name).name: size for name, size in own.items()})
            return Layer(letter, number, depth, sizes, rule, frozenset(own))
    return Layer(letter, number, depth, shape.sizes)


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
    """Return one layer of each kind, sizes and rule, in order of the kinds."""
    return _distinct(shape_of(model))


@lru_cache(maxsize=256)
def _distinct(shape: Shape) -> tuple[Layer, ...]:
    all_layers = reversed(layers_of_shape(shape))
    found = {(layer.letter, layer.sizes, layer.rule): layer for layer in all_layers}
    order = list(KINDS)
    return tuple(sorted(found.values(), key=lambda one: (order.index(one.letter), one.number)))


def block_prefix(depth: int) -> str:
    """Return what stands before the names of the tensors of an MTP block, counted from 1."""
    return f"mtp.layers.{depth - 1}."


class StoredTensor(NamedTuple):
    """A tensor as a checkpoint holds it.

    Attributes:
        key: its name.
        shape: of all experts, where it is one of experts; of one part, where parts are apart.
        parameter: what it is of.
    """

    key: str
    shape: tuple[int, ...]
    parameter: Parameter


def stored_tensors(model: Model, vocab_rows: int) -> Iterator[StoredTensor]:
    """Yield every tensor that a checkpoint holds, the parts of packed ones apart.

    Args:
        model: the model.
        vocab_rows: of embedding and head, with their padding.
    """
    usual = sizes_of(model, vocab_rows)
    yield from _parts("", EMBEDDING, usual)
    for layer in layers(model):
        for one in layer.parameters:
            yield from _parts(layer.prefix, one, layer.sizes)
    for depth in range(1, mtp_blocks(model) + 1):
        for one in mtp_block(usual):
            yield from _parts(block_prefix(depth), one, usual)
    for one in final_norm(usual):
        yield from _parts("", one, usual)
    if not model.tie_embeddings:
        yield from _parts("", HEAD, usual)


def _parts(prefix: str, one: Parameter, sizes: Sizes) -> Iterator[StoredTensor]:
    key, shape = prefix + one.stored, one.shape(sizes)
    packed = one.dims[0]
    if one.of_experts:
        yield StoredTensor(key, (sizes.experts, *shape), one)
    elif not packed.apart:
        yield StoredTensor(key, shape, one)
    else:
        for part in packed.parts:
            yield StoredTensor(f"{key}.{part.name}", (part.size(sizes), *shape[1:]), one)


def stored(model: Model) -> Iterator[tuple[str, Parameter]]:
    """Yield the key of every tensor that a checkpoint holds; packed ones by their common name."""
    for layer in layers(model):
        for one in layer.parameters:
            yield layer.prefix + one.stored, one
    sizes = sizes_of(model)
    for one in (EMBEDDING, *final_norm(sizes), HEAD):
        yield one.stored, one
    for depth in range(1, mtp_blocks(model) + 1):
        for one in mtp_block(sizes):
            yield block_prefix(depth) + one.stored, one
