"""Which rows of their tensors are which of ours, both ways, in blocks that travel one by one.

Where they have one width for all layers, ours are filled up (`hf/padding.py`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.anatomy.layers import stored_tensors
from hybrid_train.checkpoint.block_moves import Block, Rows, blocks
from hybrid_train.hf.names import Stored
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import UserError

NEVER_CHOSEN = -10000.0  # correction bias of an expert that is filled in; float16 can say it, too
_BIAS = "mlp.router.expert_bias"


@dataclass(frozen=True)
class Piece:
    """Rows of one of our tensors that are the next rows of one of theirs."""

    key: str
    start: int
    stop: int


@dataclass
class Theirs:
    """One of their tensors, and what of ours it is made of, in order."""

    name: str
    shape: tuple[int, ...]
    keeps_float32: bool
    pieces: dict[int, Piece]  # by first row


def turn_round(table: Iterator[Stored]) -> dict[str, Theirs]:
    """Turn the table round: what each of their tensors is made of."""
    found: dict[str, Theirs] = {}
    for stored in table:
        for part in stored.parts:
            one = found.setdefault(
                part.name, Theirs(part.name, part.shape, stored.keeps_float32, {})
            )
            one.pieces[part.start] = Piece(stored.key, part.at, part.at + part.rows)
    return found


def ours_from_theirs(stored: Stored, theirs: Rows) -> Iterator[tuple[int, Block]]:
    """Yield the blocks that one of our tensors is made of, in order, each with its first row.

    What their side does not have (the padding of the vocabulary) is not among them.
    """
    rest = stored.shape[1:]
    for part in stored.parts:
        dtype = theirs.dtype(part.name)
        if part.rows != part.stop - part.start:  # an expert
            yield part.at, Block(part.name, part.start, part.stop, (1, *rest), dtype)
            continue
        for first, last in blocks(part.start, part.stop, math.prod(rest) * dtype.itemsize):
            block = Block(part.name, first, last, (last - first, *rest), dtype)
            yield part.at + first - part.start, block


def theirs_from_ours(one: Theirs, ours: Rows) -> Iterator[Block]:
    """Yield the blocks that one of their tensors is made of, in order."""
    for _, piece in sorted(one.pieces.items()):
        shape, dtype = ours.shape(piece.key), ours.dtype(piece.key)
        row = math.prod(shape[1:])
        for first, last in blocks(piece.start, piece.stop, row * dtype.itemsize):
            rows = (last - first) * row // math.prod(one.shape[1:])
            yield Block(piece.key, first, last, (rows, *one.shape[1:]), dtype)


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
                if fill and values.min() <= fill + 1:
                    raise UserError(
                        f"{self.where(name)} holds {values.min().item():g}: experts that are "
                        f"filled in have {fill:g} there, and could be chosen before it"
                    )
                place = (slice(first - start, last - start), *map(slice, values.shape[1:]))
                made[place] = values
        return made
