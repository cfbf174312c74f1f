"""Gateway to megatron.core.datasets: write token files and read them."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray


@contextlib.contextmanager
def _no_rank_needed() -> Iterator[None]:
    """Silence a warning of 0.19.2's logging outside a distributed run: that it takes rank 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not determine rank", category=UserWarning)
        yield


def write_documents(
    prefix: str | Path, documents: Iterable[Sequence[int]], *, vocab_size: int
) -> int:
    """Write documents of token ids to PREFIX.bin and PREFIX.idx; return the number of tokens.

    Ids take two bytes if the vocabulary allows, else four. Each document must already end with
    the end-of-document token.
    """
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    total = 0
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
        total += len(document)
    builder.finalize(f"{prefix}.idx")
    return total


class Documents:
    """Read documents of a verified prefix, in the order in which they were written."""

    def __init__(self, prefix: str | Path) -> None:
        self._files = _open(str(prefix))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return np.array(self._files[index], dtype=np.int64)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens in each document."""
        return np.array(self._files.sequence_lengths)


def _open(prefix: str) -> IndexedDataset:
    with _no_rank_needed():
        return IndexedDataset(prefix)
