"""Pieces of documents: what a row of the data consists of, and how its tokens are read."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.documents import Documents
from hybrid_train.data.indexed import beyond_vocabulary, place_beyond


class Piece(NamedTuple):
    """Tokens [start, stop) of a document of a source."""

    document: int
    start: int
    stop: int


class Joined:
    """The documents of several files as those of one source, numbered through.

    Args:
        name: of the source.
        parts: the files.
        vocab_size: what is read must be below it; None: nobody knows.
    """

    def __init__(
        self, name: str, parts: Sequence[Documents], vocab_size: int | None = None
    ) -> None:
        self.name = name
        self._vocab_size = vocab_size
        self._parts = parts
        self._firsts = np.cumsum([0, *(len(part.lengths) for part in parts)])
        lengths = [part.lengths for part in parts]
        self.lengths: NDArray[np.int32] = lengths[0] if len(parts) == 1 else np.concatenate(lengths)
        self.tokens = int(self.lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, piece: Piece) -> NDArray[np.int64]:
        """Return the tokens of a piece, [stop - start].

        Raises:
            UserError: if an id is beyond the vocabulary: a sample at the start may not have met it,
                and a model may compute with it in silence, in the padding or on other processes.
        """
        number = 0
        if len(self._parts) > 1:
            number = int(np.searchsorted(self._firsts, piece.document, side="right")) - 1
        part = self._parts[number]
        document = piece.document - int(self._firsts[number])
        tokens = part.read(document, piece.start, piece.stop)
        size = self._vocab_size
        if size is not None and (place := place_beyond(tokens, size)) is not None:
            where = f"source {self.name}: document {document} of {part.name}"
            token = f"token {tokens[place]} at place {piece.start + place}"
            raise beyond_vocabulary(where, token, size)
        return tokens

    def file_of(self, document: int) -> tuple[str, int]:
        """Return the name of the file that holds a document, and the document's number there."""
        number = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return self._parts[number].name, document - int(self._firsts[number])

    def fingerprint(self) -> str:
        """Return what changes with the content of any part."""
        return " ".join(part.fingerprint() for part in self._parts)
