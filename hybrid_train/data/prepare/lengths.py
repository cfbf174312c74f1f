"""How long documents are: a histogram by powers of two."""

import numpy as np
from numpy.typing import NDArray

_WIDTH = 50  # characters of the longest bar


def histogram(lengths: NDArray[np.integer]) -> list[str]:
    """Draw how many documents have 1, 2-3, 4-7, ... tokens: one line for each power of two."""
    powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(powers)
    lines = []
    for power in range(int(powers.min()), len(counts)):
        low, high = 2**power, 2 ** (power + 1) - 1
        bar = "#" * int(np.ceil(_WIDTH * counts[power] / counts.max()))
        lines.append(f"  {low:>10} - {high:<10} {counts[power]:>9}  {bar}")
    return lines
