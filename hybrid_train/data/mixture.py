"""The rows of one phase: from which source each is, and which row of that source it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.order import BlendOrder, Indices
from hybrid_train.data.pieces import Piece

_BLOCK = 1024  # rows that are looked up at once

Fields = dict[str, NDArray[Any]]  # a row, by the name of a field of `Batch`


class Rows(Protocol):
    """The rows of one source in one phase; see `stream.StreamRows`, `packed.PackedRows`."""

    def prepare(self, rows: int) -> None:
        """Build what the first `rows` rows need and is worth keeping on disk."""

    def pieces(self, row: int) -> list[Piece]:
        """Return the pieces of documents in a row."""

    def fill(self, row: int) -> Fields:
        """Return the fields of a row by name, each [L]."""


@dataclass(frozen=True)
class Origin:
    """Where a row of a phase comes from."""

    source: int  # place among those that are mixed
    row: int  # of that source in this phase


class Mixture:
    """Rows of several sources in the order of a phase; row 0 is the first of the phase."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """Mix by weights; `open` says what is mixed."""
        self._sources: Sequence[Rows] = ()
        self._numbers: Sequence[int] = ()
        self._order = BlendOrder(weights, seed)
        self._block = lru_cache(maxsize=2)(self._look_up)

    def open(self, sources: Sequence[Rows], numbers: Sequence[int]) -> None:
        """Take the rows of each source, and the number of each among those of the run."""
        self._sources = sources
        self._numbers = numbers

    def counts(self, rows: int) -> Indices:
        """Return how many of the first `rows` rows are from each source, [sources]."""
        return self._order.counts(rows)

    def origin(self, row: int) -> Origin:
        """Say where a row comes from."""
        sources, rows = self._block(row // _BLOCK)
        return Origin(int(sources[row % _BLOCK]), int(rows[row % _BLOCK]))

    def pieces(self, row: int) -> list[Piece]:
        """Return the pieces of documents in a row."""
        origin = self.origin(row)
        return self._sources[origin.source].pieces(origin.row)

    def fill(self, row: int) -> Fields:
        """Return the fields of a row, each [L], and `source`, its number, []."""
        origin = self.origin(row)
        fields = self._sources[origin.source].fill(origin.row)
        return {**fields, "source": np.asarray(self._numbers[origin.source])}

    def _look_up(self, block: int) -> tuple[Indices, Indices]:
        first = block * _BLOCK
        sources = self._order.sources(first, first + _BLOCK)
        before = self._order.counts(first)
        rows = np.empty_like(sources)
        for number in np.unique(sources):
            found = np.flatnonzero(sources == number)
            rows[found] = before[number] + np.arange(len(found))
        return sources, rows
