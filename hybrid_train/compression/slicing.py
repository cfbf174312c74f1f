"""The tensors of a smaller model, read out of a checkpoint of its parent block by block.

Which elements are kept, and where they lie, is said by the selection alone. No tensor is ever in
memory as a whole if it is large. Every tensor of the parent is accounted for: kept, cut, or left
behind because it is no weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis, Part, Sizes, sizes_of
from hybrid_train.anatomy.kinds import EMBEDDING, HEAD, Parameter, final_norm, mtp_block
from hybrid_train.anatomy.layers import block_prefix, stored_tensors
from hybrid_train.anatomy.selection import (
    Indices,
    Kept,
    Selection,
    chosen,
    of_expert,
    part_positions,
    tensor_positions,
)
from hybrid_train.checkpoint.block_moves import (
    BLOCK_BYTES,
    Cast,
    Copied,
    move_all,
    moves,
    require_shapes,
)
from hybrid_train.checkpoint.tensor_files import CheckpointWriter, StoredTensors
from hybrid_train.schema.model import Model

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_GAP_BYTES = 2**16  # between rows that are kept; to read so many takes as long as to read twice


@dataclass(frozen=True)
class Slice:
    """What of a tensor of the parent a tensor of the child is.

    Attributes:
        source: the key of the parent's.
        shape: of the child's.
        parameter: what both are of.
        sizes: of the layer of the parent.
        kept: of its axes.
        part: which part of the first dimension it is, where parts are stored apart.
    """

    source: str
    shape: tuple[int, ...]
    parameter: Parameter
    sizes: Sizes
    kept: Kept
    part: Part | None = None

    def positions(self, expert: int | None = None) -> tuple[Indices | None, ...]:
        """Return which elements are kept along each dimension; of an expert, as in the child."""
        kept = self.kept if expert is None else of_expert(self.kept, expert)
        found = tensor_positions(self.parameter, self.sizes, kept)
        if self.part is None:
            return found
        return part_positions(self.part, self.sizes, kept), *found[1:]

    def require_shape(self) -> None:
        """See that as many elements are kept as the child has."""
        inner = self.shape
        if self.parameter.of_experts:
            inner = self.shape[1:]
            assert len(chosen(self.kept, Axis.experts, self.sizes)) == self.shape[0], self.source
        found = self.positions(0 if self.parameter.of_experts else None)
        for number, kept in zip(inner, found, strict=True):
            assert kept is None or len(kept) == number, f"{self.source}: {len(kept)}, not {number}"


def slices(parent: Model, child: Model, selection: Selection, rows: int) -> dict[str, Slice]:
    """Say of each tensor of a child what of the parent it is, in the order of its checkpoint.

    Args:
        parent: the model that is cut.
        child: the model that it becomes.
        selection: what is kept.
        rows: of embedding and head, with their padding.
    """
    made = dict(_sources(parent, child, selection, rows))
    shapes = {one.key: one.shape for one in stored_tensors(child, rows)}
    assert made.keys() == shapes.keys(), sorted(made.keys() ^ shapes.keys())
    found = {key: replace(made[key], shape=shape) for key, shape in shapes.items()}
    for one in found.values():
        one.require_shape()
    return found


def _sources(
    parent: Model, child: Model, selection: Selection, rows: int
) -> Iterator[tuple[str, Slice]]:
    """Yield the tensors of the child by their keys, without their shapes."""
    usual, shared = sizes_of(parent, rows), selection.shared
    head = () if child.tie_embeddings else (HEAD,)
    for one in (EMBEDDING, *final_norm(usual), *head):
        yield from _stored("", "", one, usual, shared)
    depths = {}
    for layer in selection.layers:
        ours, theirs = layer.child, layer.parent
        depths[ours.depth] = theirs.depth
        for one in theirs.parameters:
            yield from _stored(ours.prefix, theirs.prefix, one, theirs.sizes, selection.of(layer))
    for depth, origin in depths.items():
        for one in mtp_block(usual) if depth else ():
            yield from _stored(block_prefix(depth), block_prefix(origin), one, usual, shared)


def _stored(
    prefix: str, source: str, one: Parameter, sizes: Sizes, kept: Kept
) -> Iterator[tuple[str, Slice]]:
    """Yield a tensor as it is stored, the parts of a packed one apart."""
    packed, key, place = one.dims[0], prefix + one.stored, source + one.stored
    if one.of_experts or not packed.apart:
        yield key, Slice(place, (), one, sizes, kept)
        return
    for part in packed.parts:
        name = f".{part.name}"
        yield key + name, Slice(place + name, (), one, sizes, kept, part)


class SlicedTensors:
    """The tensors of a child under its names, read out of the parent's checkpoint.

    Args:
        stored: the parent's.
        made_of: what each tensor of the child is (`slices`).
    """

    def __init__(self, stored: StoredTensors, made_of: Mapping[str, Slice]) -> None:
        self._stored, self._made_of = stored, made_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._made_of[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return its number format, which is the parent's."""
        return self._stored.dtype(self._made_of[name].source)

    def where(self, name: str) -> str:
        """Name file and tensor of the parent, for errors."""
        return f"{self._stored.where(self._made_of[name].source)}, as far as it is kept,"

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor."""
        one = self._made_of[name]
        if one.parameter.of_experts:
            experts = chosen(one.kept, Axis.experts, one.sizes)[start:stop]
            return torch.stack(
                [self._expert(one, int(e), start + n) for n, e in enumerate(experts)]
            )
        rows, *columns = one.positions()
        wanted = np.arange(start, stop) if rows is None else rows[start:stop]
        made = torch.empty((stop - start, *one.shape[1:]), dtype=self.dtype(name))
        for places, values in self._spans(one.source, wanted, columns):
            if (np.diff(places) != 1).any():
                made[torch.from_numpy(places)] = values
            elif len(places) == len(made):
                return values
            else:
                made[places[0] : places[0] + len(places)] = values
        return made

    def _expert(self, one: Slice, expert: int, number: int) -> Tensor:
        """Read what is kept of an expert of the parent, by its number there and in the child."""
        whole = self._stored.read(one.source, expert, expert + 1)[0]
        return _along(whole, enumerate(one.positions(number)))

    def _spans(
        self, source: str, wanted: Indices, columns: Sequence[Indices | None]
    ) -> Iterator[tuple[Indices, Tensor]]:
        """Read rows of a tensor of the parent; yield where they belong, and their kept columns."""
        shape, dtype = self._stored.shape(source), self._stored.dtype(source)
        row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
        order = np.argsort(wanted, kind="stable")
        rows = wanted[order]
        breaks = np.flatnonzero(np.diff(rows) * row_bytes > _GAP_BYTES + row_bytes) + 1
        first, most = 0, max(1, BLOCK_BYTES // row_bytes)
        while first < len(rows):
            last = int(np.searchsorted(rows, rows[first] + most))
            near = breaks[np.searchsorted(breaks, first, side="right") :][:1]
            last = min([last, *map(int, near)])
            low, high = int(rows[first]), int(rows[last - 1]) + 1
            block = self._stored.read(source, low, high)
            inside = None if high - low == last - first else rows[first:last] - low
            yield order[first:last], _along(block, enumerate((inside, *columns)))
            first = last


def _along(values: Tensor, kept: Iterator[tuple[int, Indices | None]]) -> Tensor:
    """Return what is kept along each dimension."""
    dtype, bits = values.dtype, values.view(_INTEGERS[values.dtype.itemsize]).numpy()
    for number, places in kept:
        if places is not None:  # numpy takes a quarter of the time of torch's index_select
            bits = bits.take(places, axis=number, mode="clip")  # none is beyond, or it would check
    return torch.from_numpy(bits).view(dtype)


@dataclass(frozen=True)
class Accounted:
    """What became of a tensor of the parent.

    Attributes:
        name: of it.
        shape: of it.
        bytes: of it.
        became: its name in the child; empty: it is not there.
        kept_shape: of the child's.
        kept_bytes: of the child's.
        is_weight: whether it is one; what is none, as the optimizer's state, stays behind.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    became: str = ""
    kept_shape: tuple[int, ...] = ()
    kept_bytes: int = 0
    is_weight: bool = True


def account(stored: StoredTensors, made_of: Mapping[str, Slice]) -> list[Accounted]:
    """Say what becomes of each tensor of a parent, in the order of their names."""
    became = {one.source: (key, one.shape) for key, one in made_of.items()}
    assert len(became) == len(made_of), "a tensor of the parent is in the child twice"
    found, weights = [], stored.weights
    for name in sorted(stored.names):
        shape, width = stored.shape(name), stored.dtype(name).itemsize
        key, kept = became.get(name, ("", ()))
        found.append(
            Accounted(
                name, shape, math.prod(shape) * width, key, kept,
                math.prod(kept) * width if key else 0, name in weights,
            )
        )  # fmt: skip
    return found


def require_parent(stored: StoredTensors, parent: Model, rows: int) -> None:
    """Refuse a checkpoint that does not hold exactly the tensors of a model.

    Raises:
        UserError: naming a tensor that is missing, of another shape, or of no use.
    """
    shapes = {one.key: one.shape for one in stored_tensors(parent, rows)}
    require_shapes(stored, shapes, stored.weights)


def write(folder: Path, stored: StoredTensors, made_of: Mapping[str, Slice]) -> None:
    """Write the tensors of a child into a folder, each in the number format of the parent's.

    Raises:
        UserError: if a tensor of the parent is damaged, or what is kept of it is not finite.
    """
    side = SlicedTensors(stored, made_of)
    copied = [Copied(key, key, side.dtype(key)) for key in made_of]
    writer = CheckpointWriter(folder)
    try:
        move_all(moves(copied, side, writer), side, Cast(None))
        writer.finish()
    finally:
        writer.close()


def require_accounted(folder: Path, accounts: Sequence[Accounted]) -> None:
    """See that a written child holds the bytes that were kept, tensor by tensor."""
    kept = {one.became: one.kept_bytes for one in accounts if one.became}
    with StoredTensors(folder) as stored:
        held = {
            name: math.prod(stored.shape(name)) * stored.dtype(name).itemsize
            for name in stored.names
        }
    assert held == kept, f"{folder}: {sorted(held.items() ^ kept.items())[:4]}"
