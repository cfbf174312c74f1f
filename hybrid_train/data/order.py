"""Orders that need no memory: a keyed permutation, and which source each row of a blend is from.

Everything here is a pure function of integers, so a run finds its place again from its position.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 3  # of two half rounds each
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
_CHUNK = 2**20  # rows that are counted at once

Indices = NDArray[np.int64]


class Permutation:
    """A permutation of 0 .. size - 1 that is drawn from a key; any part of it can be asked for.

    A Feistel network over the bits of the index: each half round changes one half by a hash of the
    other, which can be undone, so no two indices meet. An image outside the range is put through
    again until it is inside (cycle walking: Black and Rogaway, Ciphers with Arbitrary Finite
    Domains, CT-RSA 2002, section 4).
    """

    def __init__(self, size: int, key: Sequence[object]) -> None:
        """Draw the permutation.

        Args:
            size: how many indices there are.
            key: whatever the draw shall depend on; its parts are told apart by their text.
        """
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64(2 ** (bits // 2) - 1)
        self._high_mask = np.uint64(2 ** (bits - bits // 2) - 1)
        digest = hashlib.sha256(repr(tuple(map(str, key))).encode()).digest()
        keys = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        self._keys = keys.random_raw(2 * _ROUNDS).astype(np.uint64)

    def __call__(self, indices: Indices) -> Indices:
        """Return the images of indices."""
        found = self._once(indices.astype(np.uint64))
        outside = np.flatnonzero(found >= self.size)
        while outside.size:
            found[outside] = self._once(found[outside])
            outside = outside[found[outside] >= self.size]
        return found.astype(np.int64)

    def _once(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = values >> self._low_bits, values & self._low_mask
        for number in range(0, 2 * _ROUNDS, 2):
            high = high ^ (mix64(low + self._keys[number]) & self._high_mask)
            low = low ^ (mix64(high + self._keys[number + 1]) & self._low_mask)
        return (high << self._low_bits) | low


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits (the finaliser of SplitMix64: Steele, Lea, Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class BlendOrder:
    """Which source each row of a blend is from, evenly mixed and without memory.

    Row i is from the source into whose share of [0, 1) the fraction of i / golden ratio + offset
    falls. The fractions of the golden ratio fill an interval as evenly as any sequence can
    (Knuth, TAOCP 3, section 6.4, theorem S), so after any number of rows each source is within a
    few rows of its share.
    """

    def __init__(self, weights: Sequence[float], seed: int = 0) -> None:
        """Lay out the shares.

        Args:
            weights: of the sources, not negative and not all zero; they need not sum to one.
            seed: moves the offset.
        """
        shares = np.asarray(weights, dtype=np.float64)
        ends = np.cumsum(shares / shares.sum())[:-1]
        # The ends between the sources as 64-bit fractions; a last end of 1 has no such fraction.
        self._ends = np.array([min(int(end * 2**64), 2**64 - 1) for end in ends], dtype=np.uint64)
        self._offset = np.random.Philox(key=seed).random_raw(1).astype(np.uint64)[0]
        self._sources = len(shares)
        self._counted = (0, np.zeros(self._sources, dtype=np.int64))

    def sources(self, first: int, last: int) -> Indices:
        """Return the source of each row in [first, last)."""
        rows = np.arange(first, last, dtype=np.uint64)
        fractions = rows * GOLDEN + self._offset
        return np.searchsorted(self._ends, fractions, side="right").astype(np.int64)

    def counts(self, rows: int) -> Indices:
        """Return how many of the first `rows` rows each source has, [sources].

        Goes on from where it was asked before, so a run pays for its position once.
        """
        done, counts = self._counted
        if rows < done:
            done, counts = 0, np.zeros_like(counts)
        counts = counts.copy()
        for first in range(done, rows, _CHUNK):
            part = self.sources(first, min(first + _CHUNK, rows))
            counts += np.bincount(part, minlength=self._sources)
        self._counted = (rows, counts)
        return counts.copy()
