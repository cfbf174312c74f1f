"""Layers of different widths told as layers of one width, the widest; zeros fill up the others.

A neuron whose weights are zero gives relu(0)^2 = 0 to the sum, so nothing else changes.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import Layer, layers
from hybrid_train.anatomy.selection import CHOSEN
from hybrid_train.checkpoint.block_moves import Rows
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import UserError

_FILLED = (Axis.ffn, Axis.expert_ffn, Axis.shared_ffn)


def one_width(model: Model) -> Model:
    """Return the model with the widest sizes in all layers of a kind, as a config.json says them.

    Raises:
        UserError: if layers differ in something that zeros cannot fill.
    """
    told = copy.deepcopy(model)
    told.layers = []
    for axis, largest in _largest(layers(model)):
        section, _, name = axis.value.rpartition(".")
        setattr(reduce(getattr, section.split("."), told), name, largest)
    return told


def _largest(all_layers: tuple[Layer, ...]) -> Iterator[tuple[Axis, int]]:
    """Yield the largest size along each axis of a layer that is there.

    Raises:
        UserError: if sizes differ that must be one.
    """
    for letter, axes in CHOSEN.items():
        of_kind = [one for one in all_layers if one.letter == letter]
        for axis in axes:
            sizes = [one.sizes.along(axis) for one in of_kind]
            if len(set(sizes)) > 1 and axis not in _FILLED:
                other = next(one for one in of_kind if one.sizes.along(axis) != sizes[0])
                raise UserError(
                    f"{other.setting(axis)} is {other.sizes.along(axis)} in layer {other.number}, "
                    f"and {of_kind[0].setting(axis)} {sizes[0]} in layer {of_kind[0].number}: the "
                    "config.json of NemotronH has one number for all layers of a kind, and zeros "
                    "can fill up the widths of MLPs and experts alone, so this model cannot be "
                    f"exported; one model.{axis.value} for all layers can"
                )
            if any(sizes):
                yield axis, max(sizes)


def filled_up(model: Model) -> dict[str, tuple[int, int]]:
    """Return the widths that zeros fill up: by setting, the narrowest and the widest."""
    widths: dict[str, set[int]] = {}
    for one in layers(model):
        for axis in set(CHOSEN[one.letter]) & set(_FILLED):
            widths.setdefault(axis.value, set()).add(one.sizes.along(axis))
    return {name: (min(own), max(own)) for name, own in widths.items() if len(own) > 1}


class Padded:
    """Tensors of one side, with zeros behind what they hold.

    Args:
        side: what they hold.
        shapes: of those that are larger here, by name.
    """

    def __init__(self, side: Rows, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._side, self._shapes = side, shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._shapes.get(name) or self._side.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return its number format."""
        return self._side.dtype(name)

    def where(self, name: str) -> str:
        """Name file and tensor, for errors."""
        return self._side.where(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor."""
        held, shape = self._side.shape(name), self.shape(name)
        if held == shape:
            return self._side.read(name, start, stop)
        made = torch.zeros((stop - start, *shape[1:]), dtype=self.dtype(name))
        last = min(stop, held[0])
        if start < last:
            values = self._side.read(name, start, last)
            made[tuple(slice(size) for size in values.shape)] = values
        return made
