"""Whether the stored parts of a tensor are all of it, each element once."""

import math
from collections.abc import Sequence
from typing import Protocol


class Chunk(Protocol):
    """A box of a tensor, as torch's checkpoints describe it."""

    @property
    def offsets(self) -> Sequence[int]: ...

    @property
    def sizes(self) -> Sequence[int]: ...


def is_partition(shape: Sequence[int], chunks: Sequence[Chunk]) -> bool:
    """Tell whether boxes cover a tensor of `shape` and none covers an element of another.

    Only boxes that share a row of the first axis are compared with each other.
    """
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        return False
    beside: list[Chunk] = []  # those before that reach into the row of the next
    for chunk in sorted(chunks, key=lambda one: tuple(one.offsets)):
        if not _is_inside(shape, chunk):
            return False
        if shape:
            row = chunk.offsets[0]
            beside = [other for other in beside if other.offsets[0] + other.sizes[0] > row]
        if any(_overlap(chunk, other) for other in beside):
            return False
        beside.append(chunk)
    return True


def _is_inside(shape: Sequence[int], chunk: Chunk) -> bool:
    axes = zip(chunk.offsets, chunk.sizes, shape, strict=True)
    return all(offset >= 0 and offset + size <= length for offset, size, length in axes)


def _overlap(one: Chunk, other: Chunk) -> bool:
    axes = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in axes)
