"""Rows of several documents, and the same documents one by one."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hybrid_train.data.batch import Batch
from hybrid_train.data.packing import fill_row
from tests.tiny import VOCAB

PADDING = VOCAB - 1


def index_of(*rows: Sequence[int]) -> Tensor:
    """The sequence index of rows whose documents have these lengths, [B, L]."""
    return torch.stack([
        torch.repeat_interleave(torch.arange(len(row), dtype=torch.int32), torch.tensor(row))
        for row in rows
    ])  # fmt: skip


def spans(index: Tensor) -> Iterator[tuple[int, int, int]]:
    """The documents of an index [B, L]: row, start and end of each."""
    for row, numbers in enumerate(index.tolist()):
        start = 0
        for end in range(1, len(numbers) + 1):
            if end == len(numbers) or numbers[end] != numbers[start]:
                yield row, start, end
                start = end


def documents(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    """Documents that take so many places: each has a token more."""
    generator = np.random.default_rng(seed)
    return [generator.integers(VOCAB, size=length + 1) for length in lengths]


def packed_batch(rows: Sequence[Sequence[np.ndarray]], length: int) -> Batch:
    """One microbatch of these rows of documents, filled up with padding."""
    filled = [fill_row(row, length, PADDING) for row in rows]
    return Batch(**{k: torch.from_numpy(np.stack([row[k] for row in filled])) for k in filled[0]})


def alone_in_a_row(document: np.ndarray) -> Batch:
    """One microbatch of one row that is this document."""
    tokens = torch.from_numpy(document)[None]
    places = torch.arange(len(document) - 1)[None]
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(places.shape), places)
