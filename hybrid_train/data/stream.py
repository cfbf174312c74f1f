"""The documents of a source one after the other, shuffled anew in each epoch, cut into rows.

This is Megatron's plain concatenation: a row begins where the one before it ended, wherever that is
in a document. The order needs no arrays of the size of the data: the shuffle is computed, and one
number is kept for every 64 documents.

Rows are shuffled a window at a time, so that a long document is not in one batch. A later phase, of
rows of another length, takes up what is left of the window first.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.documents import Joined, Span
from hybrid_train.data.index_cache import IndexCache
from hybrid_train.data.order import Permutation

_STRIDE = 64  # documents from one kept boundary to the next
_CHUNK = 2**20  # documents shuffled at once while the boundaries are built
_WINDOW = 2**16  # rows that are shuffled together


class Stream:
    """Tokens of a source in the order of training, from 0, without an end."""

    def __init__(self, documents: Joined, *, key: tuple[object, ...], cache: IndexCache) -> None:
        """Open the stream; `key` is what the shuffle depends on, beside the epoch."""
        self.documents = documents
        self.key = key
        self._cache = cache
        self._epoch = lru_cache(maxsize=2)(self._open_epoch)

    def prepare(self, first: int, last: int) -> None:
        """Build what reading tokens [first, last) needs and is worth keeping on disk."""
        size = self.documents.tokens
        if self._cache.keeps(len(self.documents)):
            for epoch in range(first // size, -(-last // size)):
                self._epoch(epoch)

    def spans(self, position: int, count: int) -> list[Span]:
        """Return the spans of documents that hold tokens [position, position + count)."""
        found: list[Span] = []
        while count > 0:
            epoch, offset = divmod(position, self.documents.tokens)
            taken = self._from_epoch(epoch, offset, count, found)
            position, count = position + taken, count - taken
        return found

    def _from_epoch(self, epoch: int, offset: int, count: int, found: list[Span]) -> int:
        """Add spans up to the next kept boundary at least; return how many tokens they have."""
        order, starts = self._epoch(epoch)
        block = int(np.searchsorted(starts, offset, side="right")) - 1
        first = block * _STRIDE
        documents = order(np.arange(first, min(first + _STRIDE, len(self.documents))))
        lengths = self.documents.lengths[documents].astype(np.int64)
        ends = int(starts[block]) + np.cumsum(lengths)
        taken = 0
        for number in range(int(np.searchsorted(ends, offset, side="right")), len(documents)):
            length = int(lengths[number])
            start = offset + taken - (int(ends[number]) - length)
            stop = min(length, start + count - taken)
            found.append(Span(int(documents[number]), start, stop))
            taken += stop - start
            if taken == count:
                break
        return taken

    def _open_epoch(self, epoch: int) -> tuple[Permutation, NDArray[np.int64]]:
        order = Permutation(len(self.documents), (*self.key, epoch))

        def boundaries() -> NDArray[np.int64]:
            sums = [np.zeros(1, dtype=np.int64)]
            for first in range(0, len(self.documents), _CHUNK):
                part = order(np.arange(first, min(first + _CHUNK, len(self.documents))))
                lengths = self.documents.lengths[part].astype(np.int64)
                sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), _STRIDE)))
            return np.cumsum(np.concatenate(sums))

        name = ("stream", *self.key, epoch)
        return order, self._cache.array(name, self.documents, boundaries)


@dataclass(frozen=True)
class StreamPosition:
    """Where cutting goes on.

    Attributes:
        position: a token of the stream.
        left_over: ranges [start, stop) of tokens before it that a phase did not come to, in order.
    """

    position: int = 0
    left_over: tuple[tuple[int, int], ...] = ()


class StreamRows:
    """Rows of one length from a place in a stream on.

    Before the shuffle row r has the tokens [r L, r L + L] of what is left over and then of the
    stream; its last token is the label of its last input, and the first input of the next row.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        length: int,
        begin: StreamPosition = StreamPosition(),
        window: int = _WINDOW,
    ) -> None:
        """Cut rows of `length` inputs."""
        self._stream = stream
        self._length = length
        self._begin = begin
        self._window = window
        ranges = np.array(begin.left_over, dtype=np.int64).reshape(-1, 2)
        self._starts = ranges[:, 0]
        self._ends = np.cumsum(ranges[:, 1] - ranges[:, 0])  # counted in tokens that are left over
        self._left_over = int(self._ends[-1]) if len(self._ends) else 0
        self._order = lru_cache(maxsize=4)(self._order_of)

    def prepare(self, rows: int) -> None:
        """Build what the first `rows` rows need."""
        self._stream.prepare(*self._span(rows))

    def _span(self, rows: int) -> tuple[int, int]:
        begin = self._begin.position
        return begin, begin + max(1, rows * self._length - self._left_over + 1)

    def first_epoch(self) -> int:
        """Return how many rows can be cut before any token comes again."""
        rest = self._stream.documents.tokens - 1 - self._begin.position
        return (self._left_over + rest) // self._length

    def end(self, rows: int) -> StreamPosition:
        """Return where the next phase goes on after the first `rows` rows; no token is lost."""
        if rows == 0:
            return self._begin
        first, order = self._order(*self._window_of(rows - 1))
        unread = np.sort(first + order(np.arange(rows - first, order.size)))
        ranges: list[tuple[int, int]] = []
        for row in unread.tolist():
            for start, stop in self._ranges(row * self._length, self._length):
                if ranges and ranges[-1][1] == start:
                    start, _ = ranges.pop()
                ranges.append((start, stop))
        beyond = (first + order.size) * self._length - self._left_over
        return StreamPosition(self._begin.position + beyond, tuple(ranges))

    def epochs(self, rows: int) -> float:
        """Return how often the source has been read through after the first `rows` rows."""
        place = self.end(rows)
        left_over = sum(stop - start for start, stop in place.left_over)
        return (place.position - left_over) / self._stream.documents.tokens

    def spans(self, row: int) -> list[Span]:
        """Return the spans of a row, in the shuffled order; together L + 1 tokens."""
        ranges = self._ranges(self._place(row) * self._length, self._length + 1)
        return [span for start, stop in ranges for span in self._stream.spans(start, stop - start)]

    def fill(self, row: int) -> dict[str, NDArray[Any]]:
        """Return tokens, labels, loss_weights and position_ids of a row, each [L]."""
        tokens = np.concatenate([self._stream.documents.read(one) for one in self.spans(row)])
        mask = np.ones(self._length, dtype=np.float32)
        # The token after a range that was left over is not the one that follows in the text.
        ends = self._ends - self._place(row) * self._length - 1
        mask[ends[(ends >= 0) & (ends < self._length)]] = 0
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_weights": mask,
            "position_ids": np.arange(self._length),
        }

    def _place(self, row: int) -> int:
        """Return where a row was before the shuffle."""
        first, order = self._order(*self._window_of(row))
        return first + int(order(np.array([row - first]))[0])

    def _ranges(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return the ranges of the stream that hold tokens [first, first + count) of the rows."""
        found = []
        while count and first < self._left_over:
            number = int(np.searchsorted(self._ends, first, side="right"))
            taken = min(count, int(self._ends[number]) - first)
            length = int(self._ends[number]) - (int(self._ends[number - 1]) if number else 0)
            start = int(self._starts[number]) + length - (int(self._ends[number]) - first)
            found.append((start, start + taken))
            first, count = first + taken, count - taken
        if count:
            start = self._begin.position + first - self._left_over
            found.append((start, start + count))
        return found

    def _window_of(self, row: int) -> tuple[int, int]:
        """Return the epoch in which a row begins, -1 before the stream, and its window there."""
        begin = row * self._length - self._left_over
        if begin < 0:
            return -1, 0  # what is left over is one window
        epoch = (self._begin.position + begin) // self._stream.documents.tokens
        return epoch, (row - self._first_row(epoch)) // self._window

    def _first_row(self, epoch: int) -> int:
        """Return the first row that begins in an epoch of the stream; 0 for what is left over."""
        if epoch < 0:
            return 0
        start = max(self._begin.position, epoch * self._stream.documents.tokens)
        return -(-(self._left_over + start - self._begin.position) // self._length)

    def _order_of(self, epoch: int, window: int) -> tuple[int, Permutation]:
        """Return the first row of a window, and the shuffle of its rows."""
        first = self._first_row(epoch) + window * self._window
        if epoch < 0:
            last = self._first_row(self._begin.position // self._stream.documents.tokens)
        else:
            last = min(first + self._window, self._first_row(epoch + 1))
        key = (*self._stream.key, self._begin.position, self._length, epoch, window)
        return first, Permutation(last - first, ("rows", *key))
