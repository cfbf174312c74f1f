"""Layers of different widths told as layers of one width, the widest; zeros fill up the others.

A neuron whose weights are zero gives relu(0)^2 = 0 or silu(0) * 0 = 0 to the sum, so nothing else
changes. An expert that is filled in is never chosen: its correction bias is far below those of the
others, and scores lie in (0, 1).
"""

import copy
from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import Layer, layers, stored_tensors
from hybrid_train.anatomy.selection import CHOSEN
from hybrid_train.checkpoint.block_moves import Rows
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import UserError

NEVER_CHOSEN = -10000.0  # correction bias of an expert that is filled in; float16 can say it, too
_FILLED = (Axis.ffn, Axis.experts, Axis.expert_ffn, Axis.shared_ffn)
_BIAS = "mlp.router.expert_bias"


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


class Padded:
    """The tensors of a checkpoint as wide as those of a wider model, with zeros that fill them up.

    Args:
        side: what they hold.
        wide: the wider model.
        vocab_size: of both, without padding.
    """

    def __init__(self, side: Rows, wide: Model, vocab_size: int) -> None:
        self._side = side
        self._shapes, self._parts = {}, {}
        rows = padded_vocab_size(vocab_size, wide.vocab_multiple)
        for one in stored_tensors(wide, rows):
            packed = one.parameter.dims[0]
            self._shapes[one.key] = one.shape
            # Gates are filled up behind the gates, neurons behind the neurons.
            self._parts[one.key] = 1 if packed.apart or packed.by else len(packed.parts)

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
        fill = NEVER_CHOSEN if name.endswith(_BIAS) else 0.0
        made = torch.full((stop - start, *shape[1:]), fill, dtype=self.dtype(name))
        parts = self._parts[name]
        narrow, wide = held[0] // parts, shape[0] // parts
        for part in range(parts):
            first, last = max(start, part * wide), min(stop, part * wide + narrow)
            if first < last:
                behind = part * (wide - narrow)  # rows that were filled in before
                values = self._side.read(name, first - behind, last - behind)
                place = (slice(first - start, last - start), *map(slice, values.shape[1:]))
                made[place] = values
        return made
