"""Documents in memory, whose tokens say where they come from."""

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.documents import Joined

WIDTH = 1000  # more than the tokens of any document here


class Listed:
    """Token t of document d is WIDTH * d + t."""

    def __init__(self, lengths: list[int], name: str = "listed") -> None:
        self.name = name
        self._lengths = np.array(lengths, dtype=np.int32)

    @property
    def lengths(self) -> NDArray[np.int32]:
        return self._lengths

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        assert 0 <= start < stop <= self._lengths[document]
        return WIDTH * document + np.arange(start, stop)

    def fingerprint(self) -> str:
        return f"{self.name} {self._lengths.tolist()}"


def listed(*lengths: int, name: str = "listed") -> Joined:
    """One source of documents in memory."""
    return Joined(name, [Listed(list(lengths), name)])


def random_lengths(number: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of documents, at least one token each."""
    return np.random.default_rng(seed).integers(1, longest + 1, number).tolist()
