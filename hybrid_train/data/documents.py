"""Documents of tokens: what every source offers, those of token files, and spans of them."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.token_files import OpenPair, beyond_vocabulary, open_files, place_beyond
from hybrid_train.schema.data import Remote
from hybrid_train.schema.problems import UserError

_CHUNK = 2**20  # entries of an index that a check holds in memory
_INDEX_BLOCKS, _TOKEN_BLOCKS, _BLOCK_BYTES = 32, 4, 4096  # of a fingerprint; the second by network


class Documents(Protocol):
    """Numbered documents of token ids, of which each ends with the end-of-document token."""

    name: str  # for messages: the prefix, or the stream's description

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, [D]; without a copy where possible."""

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of a document."""

    def fingerprint(self) -> str:
        """Changes when the content may have changed: sizes, index, a sample; no times of files."""


class Span(NamedTuple):
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

    def read(self, span: Span) -> NDArray[np.int64]:
        """Return the tokens of a span, [stop - start].

        Raises:
            UserError: if an id is beyond the vocabulary: a sample at the start may not have met it,
                and a model may compute with it in silence, in the padding or on other processes.
        """
        number = 0
        if len(self._parts) > 1:
            number = int(np.searchsorted(self._firsts, span.document, side="right")) - 1
        part = self._parts[number]
        document = span.document - int(self._firsts[number])
        tokens = part.read(document, span.start, span.stop)
        size = self._vocab_size
        if size is not None and (place := place_beyond(tokens, size)) is not None:
            where = f"source {self.name}: document {document} of {part.name}"
            token = f"token {tokens[place]} at place {span.start + place}"
            raise beyond_vocabulary(where, token, size)
        return tokens

    def file_of(self, document: int) -> tuple[str, int]:
        """Return the name of the file that holds a document, and the document's number there."""
        number = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return self._parts[number].name, document - int(self._firsts[number])

    def fingerprint(self) -> str:
        """Return what changes with the content of any part."""
        return " ".join(part.fingerprint() for part in self._parts)


class FileDocuments:
    """Documents of a .bin/.idx pair in a folder or behind a URL.

    A document may consist of several sequences of the index, which then follow each other in the
    .bin. Can be pickled: the copy opens the files again.

    Args:
        prefix: path or URL without .bin or .idx.
        vocab_size: as for `verify`.
        remote: how a URL is read; the defaults if None.

    Raises:
        UserError: as `verify`, or if the index contradicts itself.
    """

    def __init__(
        self, prefix: str, vocab_size: int | None = None, *, remote: Remote | None = None
    ) -> None:
        self.name = prefix
        self._arguments = (vocab_size, remote)
        opened = open_files(prefix, vocab_size, remote=remote)
        self._opened = opened
        self._dtype, self._width = opened.facts.dtype, opened.facts.dtype.itemsize
        self._read_bytes, self._size = opened.bin.read, opened.bin.size
        if opened.lengths.min() < 0:
            raise UserError(
                f"{prefix}.idx contradicts itself: it has a sequence of {opened.lengths.min()} "
                "tokens; write the files anew"
            )
        if _one_sequence_each(opened):
            self._starts, self._lengths = opened.offsets, opened.lengths
        else:
            self._starts, self._lengths = _grouped(opened)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.name, *self._arguments)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, [D]; a view of the index if each document is one sequence."""
        return self._lengths

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of a document.

        Raises:
            IndexError: if the document has no such tokens.
            UserError: if the index points outside the .bin, or a remote file cannot be read.
        """
        if not 0 <= document < len(self._lengths):
            raise IndexError(f"document {document} of {len(self._lengths)}, {self.name}")
        length = self._lengths.item(document)  # `item` is half the time of an index and `int`
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens {start} to {stop} of a document of {length}, {self.name}")
        first = self._starts.item(document) + start * self._width
        last = first + (stop - start) * self._width
        if first < 0 or last > self._size:
            error = UserError(
                f"{self.name}.idx places document {document} outside {self.name}.bin; "
                "write the files anew"
            )
            error.of_content = True
            raise error
        return self._read_bytes(first, last).view(self._dtype).astype(np.int64)

    def fingerprint(self) -> str:
        """Name the content: sizes, blocks of the index and of the tokens, wherever they lie."""
        return self._fingerprint

    @cached_property  # what was opened does not change: a changed remote file is an error
    def _fingerprint(self) -> str:
        index, file = self._opened.idx, self._opened.bin
        digest = hashlib.sha256(f"{len(index)} {file.size}".encode())
        for start, stop in _sampled_blocks(len(index), _INDEX_BLOCKS):
            digest.update(index[start:stop])
        for start, stop in _sampled_blocks(file.size, _TOKEN_BLOCKS):
            digest.update(file.peek(start, stop))
        return digest.hexdigest()[:32]


def _reopen(prefix: str, vocab_size: int | None, remote: Remote | None) -> FileDocuments:
    return FileDocuments(prefix, vocab_size, remote=remote)


def _one_sequence_each(opened: OpenPair) -> bool:
    """Whether document d is sequence d, for all d."""
    boundaries = opened.boundaries
    if len(boundaries) != len(opened.lengths) + 1:
        return False
    return all(
        np.array_equal(part, np.arange(first, first + len(part)))
        for first in range(0, len(boundaries), _CHUNK)
        for part in [boundaries[first : first + _CHUNK]]
    )


def _grouped(opened: OpenPair) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Where documents of any number of sequences start, in bytes [D], and their lengths [D]."""
    index, boundaries = f"{opened.facts.prefix}.idx", opened.boundaries
    if boundaries[0] != 0 or (np.diff(boundaries) < 0).any():
        raise UserError(f"{index} contradicts itself: its documents overlap; write the files anew")
    ends = np.concatenate([[0], np.cumsum(opened.lengths, dtype=np.int64)])
    if not np.array_equal(ends[:-1] * opened.facts.dtype.itemsize, opened.offsets):
        raise UserError(
            f"{index} joins sequences to documents that do not follow each other in the .bin; "
            "write the files anew"
        )
    lengths = np.diff(ends[boundaries])
    if lengths.max(initial=0) > np.iinfo(np.int32).max:
        raise UserError(
            f"{index} has a document of {lengths.max()} tokens; at most 2147483647 can be read: "
            "split it when you write the files"
        )
    return ends[boundaries[:-1]] * opened.facts.dtype.itemsize, lengths.astype(np.int32)


def _sampled_blocks(size: int, count: int) -> Iterator[tuple[int, int]]:
    """Evenly spaced blocks of a file, both ends among them; all of it if it is short."""
    if size <= count * _BLOCK_BYTES:
        yield 0, size
        return
    for number in range(count):
        start = (size - _BLOCK_BYTES) * number // (count - 1)
        yield start, start + _BLOCK_BYTES
