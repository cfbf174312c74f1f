"""Token files without torch: write and read .bin and .idx, laid out as `indexed.py` says.

Nothing here holds more than a stretch of a file in memory, however many documents it has.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.indexed import HEADER, MAGIC, TOKEN_TYPES, open_files

_STRETCH = 2**20  # documents
# megatron-core 0.19.2, DType.optimal_dtype: two bytes up to here, though 65536 ids would fit
_LARGEST_SHORT_VOCABULARY = 65500


def dtype_for(vocab_size: int) -> np.dtype[np.generic]:
    """Return the type of ids: two bytes where the vocabulary allows, else four."""
    return np.dtype("<u2") if vocab_size < _LARGEST_SHORT_VOCABULARY else np.dtype("<i4")


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; as fast as the disk with SHA instructions."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(
    path: Path,
    dtype: np.dtype[np.generic],
    lengths: NDArray[np.int32],
    boundaries: NDArray[np.int64] | None = None,
) -> None:
    """Write an .idx.

    Args:
        path: of the .idx.
        dtype: of the ids.
        lengths: tokens in each sequence; may be mapped from a file.
        boundaries: first sequence of each document, and the number of sequences at the end; None
            if each document is one sequence.
    """
    code = next(code for code, known in TOKEN_TYPES.items() if np.dtype(known) == dtype)
    count = len(lengths) + 1 if boundaries is None else len(boundaries)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), count))
        for part in _stretches(lengths):
            file.write(part.astype("<i4").tobytes())
        offset = 0
        for part in _stretches(lengths):
            ends = offset + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            starts = ends - part.astype(np.int64) * dtype.itemsize
            file.write(starts.astype("<i8").tobytes())
            offset = int(ends[-1])
        if boundaries is not None:
            for bounds in _stretches(boundaries):
                file.write(bounds.astype("<i8").tobytes())
            return
        for start in range(0, count, _STRETCH):
            file.write(np.arange(start, min(start + _STRETCH, count), dtype="<i8").tobytes())


def write_documents(
    prefix: str | Path, documents: Iterable[Sequence[int]], *, vocab_size: int
) -> int:
    """Write documents of token ids to PREFIX.bin and PREFIX.idx; return the number of tokens.

    Each document must already end with the end-of-document token.
    """
    dtype, lengths = dtype_for(vocab_size), []
    with Path(f"{prefix}.bin").open("wb") as file:
        for document in documents:
            file.write(np.asarray(document).astype(dtype).tobytes())
            lengths.append(len(document))
    write_index(Path(f"{prefix}.idx"), dtype, np.array(lengths, dtype=np.int32))
    return sum(lengths)


def _stretches[T: np.generic](array: NDArray[T]) -> Iterator[NDArray[T]]:
    for start in range(0, len(array), _STRETCH):
        yield array[start : start + _STRETCH]


class TokenReader:
    """Documents of a pair of token files, mapped into memory.

    Attributes:
        facts: number of documents and tokens, type of the ids.
        lengths: tokens in each sequence, int32[S].
        offsets: first byte of each sequence, int64[S].
        boundaries: first sequence of each document, then S: int64[documents + 1].
        tokens: all ids.

    Raises:
        UserError: if the files are not there, or not whole.
    """

    def __init__(self, prefix: str | Path) -> None:
        opened = open_files(str(prefix))
        self.facts = opened.facts
        self.lengths, self.offsets = opened.lengths, opened.offsets
        self.boundaries = opened.boundaries
        self.tokens: NDArray[Any] = opened.bin.whole().view(opened.facts.dtype)

    def __len__(self) -> int:
        return self.facts.documents

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        first, behind = int(self.boundaries[number]), int(self.boundaries[number + 1])
        parts = [self._sequence(sequence) for sequence in range(first, behind)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _sequence(self, number: int) -> NDArray[np.int64]:
        start = int(self.offsets[number]) // self.facts.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[number])].astype(np.int64)

    def document_lengths(self, first: int = 0, behind: int | None = None) -> NDArray[np.int64]:
        """Return the tokens in each of some documents."""
        bounds = np.asarray(self.boundaries[first : None if behind is None else behind + 1])
        lengths = self.lengths[int(bounds[0]) : int(bounds[-1])].astype(np.int64)
        total = np.concatenate([[0], np.cumsum(lengths)])
        return np.diff(total[bounds - bounds[0]])
