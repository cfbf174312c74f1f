"""Pieces of documents put into rows of equal length, as few as best fit makes of them.

A piece of n tokens takes n - 1 places of a row: its last token is a label only.
Dimensions: L places of a row.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]


def best_fit(lengths: Integers, row_length: int) -> NDArray[np.int32]:
    """Give every piece a row: the longest first, each into the fullest row that has room for it.

    Of pieces of equal length, and of rows with equal room, the earlier comes first. No two rows
    could be one; their number is at most 11/9 of the least possible, plus 4.

    Args:
        lengths: places that each piece takes, 1 to `row_length`.
        row_length: L.

    Returns:
        Number of the row of each piece, from 0, in the order of `lengths`.

    Raises:
        ValueError: if a piece takes less than one place, or more than a row has.

    Source: Johnson, Demers, Ullman, Garey and Graham, SIAM J. Comput. 3(4), 1974 (best-fit
    decreasing).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= row_length:
        raise ValueError(
            f"pieces take {lengths.min()} to {lengths.max()} places, but a row has 1 to "
            f"{row_length}; cut longer ones before"
        )
    order = np.argsort(-lengths, kind="stable")
    rows = np.empty(lengths.shape, dtype=np.int32)
    unit = max(1, lengths.size)  # a row with room is one number, places left * unit + row
    rooms: list[int] = []  # in order
    opened = 0
    for piece, length in zip(order.tolist(), (lengths[order] * unit).tolist(), strict=True):
        fullest = bisect_left(rooms, length)
        if fullest < len(rooms):
            room = rooms.pop(fullest)
        else:
            room, opened = row_length * unit + opened, opened + 1
        rows[piece] = room % unit
        if room - length >= unit:
            insort(rooms, room - length)
    return rows


def fill_row(pieces: Sequence[Integers], row_length: int, pad_id: int) -> dict[str, NDArray[Any]]:
    """Put pieces one behind the other into a row, and padding behind them.

    Args:
        pieces: tokens of each, at least two.
        row_length: L.
        pad_id: token and label of the padding; neither counts.

    Returns:
        What a batch holds of the row, each [L]: tokens, labels and position_ids in int64,
        loss_weights in float32, padding in bool, and in int32 sequence_index, where padding is one
        more document.

    Raises:
        ValueError: if a piece has no label, or all together do not fit.
    """
    places = [len(piece) - 1 for piece in pieces]
    taken = sum(places)
    if min(places, default=1) < 1 or taken > row_length:
        raise ValueError(f"pieces of {places} places each do not make a row of {row_length}")
    runs = np.array([*places, row_length - taken])
    starts = np.cumsum(runs) - runs
    tokens, labels = np.full((2, row_length), pad_id, dtype=np.int64)
    for piece, start, length in zip(pieces, starts.tolist(), places, strict=False):
        tokens[start : start + length] = piece[:-1]
        labels[start : start + length] = piece[1:]
    padding = np.arange(row_length) >= taken
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_weights": (~padding).astype(np.float32),
        "padding": padding,
        "position_ids": np.arange(row_length) - np.repeat(starts, runs),
        "sequence_index": np.repeat(np.arange(len(runs), dtype=np.int32), runs),
    }
