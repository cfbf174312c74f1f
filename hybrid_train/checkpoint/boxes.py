"""Cuts a range of a tensor's elements into boxes, the only shapes that a checkpoint stores.

The distributed optimizer gives each rank a range of a flattened parameter, which begins and ends
anywhere; a checkpoint names a part of a tensor by offset and size along each axis.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor whose elements lie one after the other."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the box."""
        return math.prod(self.size)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut the elements [start, stop) of a row-major tensor of `shape` into boxes, in order.

    There are at most two for each axis but the first: the rest of a row, whole rows, the beginning
    of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are [first, last)
    if first > last:  # begins and ends inside one row
        yield from _inside(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _inside(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * row < stop:
        yield from _inside(shape, last, 0, stop - last * row)


def _inside(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes(shape[1:], start, stop):
        yield Box((row, *box.offset), (1, *box.size))
