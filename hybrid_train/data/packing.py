"""Whole documents of a source packed into rows, so that as little as possible is padding.

Dimensions: L places of a row. A span of n tokens takes n - 1: its last token is a label only.

Documents come in the shuffled order of an epoch, a window at a time; those of a window are packed
together by best fit, and its rows are shuffled. A document that is longer than a row is cut into
full rows and a rest.

Source of best-fit packing: Ding et al., Fewer Truncations Improve Language Modeling,
arXiv:2404.10830.
"""

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.documents import Joined, Span
from hybrid_train.data.index_cache import IndexCache
from hybrid_train.data.order import Permutation
from hybrid_train.schema.problems import UserError

Integers = NDArray[np.integer[Any]]
_WINDOW = 4096  # documents that are packed together


@dataclass(frozen=True)
class PackedPosition:
    """Where packing goes on: a window, after spans that a phase before left over."""

    epoch: int = 0
    window: int = 0
    left_over: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Packing:
    """What the rows of a source depend on.

    Attributes:
        length: L, inputs of a row.
        longest: inputs of the longest span of a document; at most L.
        padding: token that fills a row up; it is not trained on.
    """

    length: int
    longest: int
    padding: int


class PackedRows:
    """Packed rows from a place in a source on."""

    def __init__(
        self,
        documents: Joined,
        packing: Packing,
        *,
        key: tuple[object, ...],
        cache: IndexCache,
        begin: PackedPosition = PackedPosition(),
    ) -> None:
        """Start at a place; `key` is what the shuffle depends on, beside the epoch."""
        self.documents = documents
        self._packing = packing
        self._key = key
        self._cache = cache
        self._begin = begin
        self._num_windows = -(-len(documents) // _WINDOW)
        self._window = lru_cache(maxsize=2)(self._pack_window)
        left_over = np.array(begin.left_over, dtype=np.int64).reshape(-1, 3)
        self._left_over = self._packed(self._cut(left_over))
        # Rows before each epoch, from that of the place on; grows as far as somebody asks.
        self._epoch_starts = [len(self._left_over)]
        self._rows_before = lru_cache(maxsize=2)(self._count_rows)

    def prepare(self, rows: int) -> None:
        """Find the epochs of the first `rows` rows."""
        while self._epoch_starts[-1] < rows:
            self._add_epoch()

    def _add_epoch(self) -> None:
        epoch = self._begin.epoch + len(self._epoch_starts) - 1
        self._epoch_starts.append(self._epoch_starts[-1] + self._rows_of(epoch))

    def first_epoch(self) -> int:
        """Return how many rows there are before any document comes again."""
        if len(self._epoch_starts) == 1:
            self._add_epoch()
        return self._epoch_starts[1]

    def end(self, rows: int) -> PackedPosition:
        """Return where the next phase goes on after the first `rows` rows; nothing is lost."""
        if rows == 0:
            return self._begin
        if rows <= len(self._left_over):
            rest = self._left_over[rows:]
            return dataclasses.replace(self._begin, left_over=_flat(rest))
        epoch, window, number = self._locate(rows - 1)
        rest = self._window(epoch, window)[number + 1 :]
        epoch, window = divmod(epoch * self._num_windows + window + 1, self._num_windows)
        return PackedPosition(epoch, window, _flat(rest))

    def epochs(self, rows: int) -> float:
        """Return how often the source has been read through after the first `rows` rows."""
        place = self.end(rows)
        left_over = sum(span.stop - span.start for span in place.left_over)
        passed = place.epoch + place.window / self._num_windows
        return max(0.0, passed - left_over / self.documents.tokens)  # windows are not of equal size

    def spans(self, row: int) -> list[Span]:
        """Return the spans of a row."""
        if row < len(self._left_over):
            return self._left_over[row]
        epoch, window, number = self._locate(row)
        return self._window(epoch, window)[number]

    def fill(self, row: int) -> dict[str, NDArray[Any]]:
        """Return the fields of a row by name, each [L]; see `fill_row`."""
        parts = [self.documents.read(span) for span in self.spans(row)]
        return fill_row(parts, self._packing.length, self._packing.padding)

    def _locate(self, row: int) -> tuple[int, int, int]:
        """Return epoch, window and number within the window of a row after the left-over ones."""
        self.prepare(row + 1)
        passed = int(np.searchsorted(self._epoch_starts, row, side="right")) - 1
        epoch = self._begin.epoch + passed
        before = self._rows_before(epoch)
        skipped = int(before[self._begin.window]) if passed == 0 else 0
        row += skipped - self._epoch_starts[passed]
        window = int(np.searchsorted(before, row, side="right")) - 1
        return epoch, window, row - int(before[window])

    def _rows_of(self, epoch: int) -> int:
        before = self._rows_before(epoch)
        first = self._begin.window if epoch == self._begin.epoch else 0
        return int(before[-1] - before[first])

    def _count_rows(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows before each window of an epoch and, at the end, all of them."""

        def count() -> NDArray[np.int64]:
            rows = [
                int(self._rows_taken(self._window_spans(epoch, window)).max(initial=-1)) + 1
                for window in range(self._num_windows)
            ]
            return np.cumsum([0, *rows])

        shape = (self._packing.length, self._packing.longest)
        before = self._cache.array(("packed", *self._key, epoch, *shape), self.documents, count)
        if not before[-1]:
            raise UserError(
                f"{self.documents.name} has no document of two tokens or more: there is nothing to "
                "predict; leave it out"
            )
        return before

    def _pack_window(self, epoch: int, window: int) -> list[list[Span]]:
        rows = self._packed(self._window_spans(epoch, window))
        shuffle = Permutation(len(rows), ("rows", *self._key, epoch, window)) if rows else None
        return [rows[place] for place in shuffle(np.arange(len(rows)))] if shuffle else []

    def _window_spans(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return the spans of a window, (document, start, stop), [spans, 3]."""
        order = Permutation(len(self.documents), (*self._key, epoch))
        first = window * _WINDOW
        numbers = order(np.arange(first, min(first + _WINDOW, len(self.documents))))
        lengths = self.documents.lengths[numbers].astype(np.int64)
        return self._cut(np.stack([numbers, np.zeros_like(numbers), lengths], axis=1))

    def _cut(self, spans: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cut spans (document, start, stop) [spans, 3] into those that a row takes."""
        longest = self._packing.longest
        document, begin, end = spans.T
        parts = -(-(end - begin - 1) // longest)  # none where there is nothing to predict
        owner = np.repeat(np.arange(len(spans)), parts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
        start = begin[owner] + within * longest
        stop = np.minimum(start + longest + 1, end[owner])
        return np.stack([document[owner], start, stop], axis=1)

    def _rows_taken(self, spans: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the row that each span takes before the shuffle, [spans]."""
        return best_fit(spans[:, 2] - spans[:, 1] - 1, self._packing.length)

    def _packed(self, spans: NDArray[np.int64]) -> list[list[Span]]:
        row_of = self._rows_taken(spans)
        rows: list[list[Span]] = [[] for _ in range(int(row_of.max(initial=-1)) + 1)]
        for row, span in zip(row_of.tolist(), spans.tolist(), strict=True):
            rows[row].append(Span(*span))
        return rows


def _flat(rows: list[list[Span]]) -> tuple[Span, ...]:
    return tuple(span for row in rows for span in row)


def best_fit(lengths: Integers, row_length: int) -> NDArray[np.int32]:
    """Give every span a row: the longest first, each into the fullest row that has room for it.

    Of spans of equal length, and of rows with equal room, the earlier comes first. No two rows
    could be one; their number is at most 11/9 of the least possible, plus 4.

    Args:
        lengths: places that each span takes, 1 to `row_length`.
        row_length: L.

    Returns:
        Number of the row of each span, from 0, in the order of `lengths`.

    Raises:
        ValueError: if a span takes less than one place, or more than a row has.

    Source: Johnson, Demers, Ullman, Garey and Graham, SIAM J. Comput. 3(4), 1974 (best-fit
    decreasing).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= row_length:
        raise ValueError(
            f"spans take {lengths.min()} to {lengths.max()} places, but a row has 1 to "
            f"{row_length}; cut longer ones before"
        )
    order = np.argsort(-lengths, kind="stable")
    rows = np.empty(lengths.shape, dtype=np.int32)
    unit = max(1, lengths.size)  # a row with room is one number, places left * unit + row
    rooms: list[int] = []  # in order
    opened = 0
    for span, length in zip(order.tolist(), (lengths[order] * unit).tolist(), strict=True):
        fullest = bisect_left(rooms, length)
        if fullest < len(rooms):
            room = rooms.pop(fullest)
        else:
            room, opened = row_length * unit + opened, opened + 1
        rows[span] = room % unit
        if room - length >= unit:
            insort(rooms, room - length)
    return rows


def fill_row(spans: Sequence[Integers], row_length: int, pad_id: int) -> dict[str, NDArray[Any]]:
    """Put spans one behind the other into a row, and padding behind them.

    Args:
        spans: tokens of each, at least two.
        row_length: L.
        pad_id: token and label of the padding; neither counts.

    Returns:
        What a batch holds of the row, each [L]: tokens, labels and position_ids in int64,
        loss_weights in float32, padding in bool, and in int32 sequence_index, where padding is one
        more document.

    Raises:
        ValueError: if a span has no label, or all together do not fit.
    """
    places = [len(span) - 1 for span in spans]
    taken = sum(places)
    if min(places, default=1) < 1 or taken > row_length:
        raise ValueError(f"spans of {places} places each do not make a row of {row_length}")
    runs = np.array([*places, row_length - taken])
    starts = np.cumsum(runs) - runs
    tokens, labels = np.full((2, row_length), pad_id, dtype=np.int64)
    for span, start, length in zip(spans, starts.tolist(), places, strict=False):
        tokens[start : start + length] = span[:-1]
        labels[start : start + length] = span[1:]
    padding = np.arange(row_length) >= taken
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_weights": (~padding).astype(np.float32),
        "padding": padding,
        "position_ids": np.arange(row_length) - np.repeat(starts, runs),
        "sequence_index": np.repeat(np.arange(len(runs), dtype=np.int32), runs),
    }
