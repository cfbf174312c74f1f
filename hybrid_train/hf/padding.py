"""Layers of different widths told as layers of one width, the widest; zeros fill up the others.

A neuron whose weights are zero gives relu(0)^2 = 0 or silu(0) * 0 = 0 to the sum, so nothing else
changes. An expert that is filled in is never chosen: its correction bias is far below those of the
others, and scores lie in (0, 1). The tensors are filled up by `Padded` of `hf/tensors.py`.
"""

import copy
from collections.abc import Iterator
from functools import reduce

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.kinds import CHOSEN
from hybrid_train.anatomy.layers import Layer, layers
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import UserError

_FILLED = (Axis.ffn, Axis.experts, Axis.expert_ffn, Axis.shared_ffn)


def one_width(model: Model) -> Model:
    """Return the model with the widest sizes in all layers of a kind, as a config.json says them.

    Raises:
        UserError: if layers differ in something that zeros cannot fill.
    """
    for reason in uneven(model):
        raise UserError(reason)
    told = copy.deepcopy(model)
    told.layers = []
    for axis, sizes in _sizes(layers(model)):
        if any(sizes.values()):
            section, _, name = axis.value.rpartition(".")
            setattr(reduce(getattr, section.split("."), told), name, max(sizes.values()))
    return told


def uneven(model: Model) -> Iterator[str]:
    """Yield what differs from layer to layer and zeros cannot fill, in words."""
    for axis, sizes in _sizes(layers(model)):
        if len(set(sizes.values())) == 1 or axis in _FILLED:
            continue
        first = next(iter(sizes))
        other = next(one for one in sizes if sizes[one] != sizes[first])
        yield (
            f"{other.setting(axis)} is {sizes[other]} in layer {other.number}, and "
            f"{first.setting(axis)} {sizes[first]} in layer {first.number}: a config.json has one "
            "number for all layers of a kind, and zeros can fill up the widths of MLPs and "
            "experts and the number of experts alone, so this model cannot be exported; one "
            f"model.{axis.value} for all layers can"
        )


def _sizes(all_layers: tuple[Layer, ...]) -> Iterator[tuple[Axis, dict[Layer, int]]]:
    """Yield the sizes along each axis of which layers can have their own, of the layers there."""
    for letter, axes in CHOSEN.items():
        of_kind = [one for one in all_layers if one.letter == letter]
        for axis in axes if of_kind else ():
            yield axis, {one: one.sizes.along(axis) for one in of_kind}


def filled_up(model: Model) -> dict[str, tuple[int, int]]:
    """Return the widths that zeros fill up: by setting, the narrowest and the widest."""
    widths = {axis.value: set(sizes.values()) for axis, sizes in _sizes(layers(model))}
    names = {axis.value for axis in _FILLED}
    return {
        name: (min(own), max(own)) for name, own in widths.items() if name in names and len(own) > 1
    }
