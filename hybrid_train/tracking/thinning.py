"""Curves of any length as few points: of each column of the figure the lowest and the highest.

A spike of one step among a hundred thousand stays where it is and as high as it is.
"""

import math
from collections.abc import Sequence
from itertools import groupby

Points = list[tuple[float, float]]


def thin(xs: Sequence[float], ys: Sequence[float], columns: int) -> Points:
    """Keep at most two points of each column, in the order in which they came.

    Args:
        xs: growing.
        ys: as many; what is not finite becomes one NaN a column, where a curve is broken.
        columns: width of the figure in points that an eye can tell apart.

    Returns:
        Points; all of them, if there are at most two a column anyway.
    """
    pairs = list(zip(xs, ys, strict=True))
    if len(pairs) <= 2 * columns:
        return pairs
    first, last = pairs[0][0], pairs[-1][0]
    scale = columns / (last - first)

    def column(pair: tuple[float, float]) -> int:
        return min(columns - 1, int((pair[0] - first) * scale))

    found: Points = []
    for _, group in groupby(pairs, column):
        members = list(group)
        finite = [pair for pair in members if math.isfinite(pair[1])]
        kept = {min(finite, key=_height), max(finite, key=_height)} if finite else set()
        found += sorted(kept)
        if len(finite) < len(members):
            found.append((members[-1][0], math.nan))
    return found


def _height(pair: tuple[float, float]) -> float:
    return pair[1]


def sampled(xs: Sequence[float], ys: Sequence[float], number: int) -> Points:
    """Keep about so many points, equally far apart, and the last: enough for what is smooth."""
    every = max(1, -(-len(xs) // number))
    places = [*range(0, len(xs) - 1, every), *([len(xs) - 1] if len(xs) else [])]
    return [(xs[place], ys[place]) for place in places]


def highest(xs: Sequence[float], ys: Sequence[float], edges: Sequence[float]) -> list[float | None]:
    """Return the highest value of each column of a table; None where a column has none.

    Args:
        xs: growing.
        ys: as many.
        edges: of the columns, growing; the last edge belongs to the last column.
    """
    found: list[float | None] = [None] * (len(edges) - 1)
    column = 0
    for x, y in zip(xs, ys, strict=True):
        while column < len(found) - 1 and x >= edges[column + 1]:
            column += 1
        if math.isfinite(y):
            before = found[column]
            found[column] = y if before is None else max(before, y)
    return found
