"""How long documents are: a histogram by powers of two."""

import numpy as np
from numpy.typing import NDArray

_WIDTH = 50  # characters of the longest bar


def histogram(lengths: NDArray[np.integer]) -> list[str]:
    """Draw how many documents have 0, 1, 2-3, 4-7, ... tokens: a line for each power of two."""
    # Bin b > 0 has the lengths from 2**(b - 1) on; log2 is exact at powers of two.
    bins = np.where(lengths > 0, 1 + np.floor(np.log2(np.maximum(lengths, 1))), 0).astype(np.int64)
    counts = np.bincount(bins)
    lines = []
    for number in range(int(bins.min()), len(counts)):
        low, high = (2**number) // 2, 2**number - 1
        bar = "#" * int(np.ceil(_WIDTH * counts[number] / counts.max()))
        lines.append(f"  {low:>10} - {high:<10} {counts[number]:>9}  {bar}")
    return lines
