"""Which rows of their tensors are which of ours, both ways, in blocks that travel one by one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.checkpoint.block_moves import Block, Rows, blocks
from hybrid_train.hf.names import Stored


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
