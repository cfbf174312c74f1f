"""Token files (.bin with the tokens, .idx with their boundaries): layout, check, reading, writing.

Layout of an .idx (megatron-core 0.19.2, `indexed_dataset.py`), little endian:
    magic 9 bytes | version uint64 | dtype code uint8 | sequences S uint64 | boundaries D + 1 uint64
    lengths int32[S] | byte offsets int64[S] | document boundaries int64[D + 1]

Document d consists of the sequences [boundaries[d], boundaries[d + 1]).

Nothing here holds more than a chunk of a file in memory, however many documents it has.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.remote import File, is_remote, open_file
from hybrid_train.schema.data import Remote
from hybrid_train.schema.problems import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_REMEDY = "write the files anew, or copy both from where they are whole"
_REMOTE_BLOCKS = 8  # that a check of a remote file reads, each by a request of its own
_CHUNK = 2**20  # documents
# megatron-core 0.19.2, DType.optimal_dtype: two bytes up to here, though 65536 ids would fit
_LARGEST_SHORT_VOCABULARY = 65500


@dataclass(frozen=True)
class TokenFile:
    """What the index says about one pair of files."""

    prefix: str
    documents: int
    tokens: int
    dtype: np.dtype[np.generic]


@dataclass(frozen=True)
class OpenPair:
    """A pair of files that belong together, open.

    Attributes:
        facts: what the index says.
        bin: the tokens.
        idx: all bytes of the index.
        lengths: tokens of each sequence, int32 [S], a view of the index.
        offsets: where each sequence starts in the .bin, in bytes, int64 [S], a view of the index.
        boundaries: first sequence of each document, and S, int64 [D + 1], a view of the index.
    """

    facts: TokenFile
    bin: File
    idx: NDArray[np.uint8]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    boundaries: NDArray[np.int64]


def verify(
    prefix: str, vocab_size: int | None = None, *, remote: Remote | None = None
) -> TokenFile:
    """Check that both files are there, whole, and belong together; reads a few kilobytes.

    Of a remote prefix, the whole index is fetched into the cache folder, unless it is there.

    Args:
        prefix: path or URL without .bin or .idx.
        vocab_size: if given, tokens at 64 places of the file (8 of a remote one) must be below it.
        remote: how a URL is read; the defaults if None.

    Raises:
        UserError: names the file, what is wrong with it, and what to do.
    """
    return open_files(prefix, vocab_size, remote=remote).facts


def open_files(
    prefix: str, vocab_size: int | None = None, *, remote: Remote | None = None
) -> OpenPair:
    """Check as `verify` does, and keep both files open."""
    index_file, tokens_file = (_open(prefix, suffix, remote) for suffix in (".idx", ".bin"))
    opened = _parse(prefix, index_file, tokens_file)
    found = opened.facts
    expected, actual = found.tokens * found.dtype.itemsize, tokens_file.size
    if actual != expected:
        state = "is truncated" if actual < expected else "does not belong to its index"
        raise UserError(
            f"{tokens_file.name} {state}: it has {actual} bytes, {index_file.name} describes "
            f"{expected}; {_REMEDY}"
        )
    if vocab_size is not None:
        _check_vocabulary(found, tokens_file, vocab_size)
    return opened


def _open(prefix: str, suffix: str, remote: Remote | None) -> File:
    path = f"{prefix}{suffix}"
    hint = ""
    if prefix.endswith((".bin", ".idx")):
        hint = " (a prefix is written without .bin or .idx)"
    try:
        return open_file(path, remote)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"{path} does not exist{hint}; check the prefixes of the data section"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}; check its permissions, or the "
            "prefixes of the data section"
        ) from error


def _parse(prefix: str, file: File, tokens_file: File) -> OpenPair:
    if file.size < HEADER.size:
        raise UserError(f"{file.name} is truncated: it ends within its header; {_REMEDY}")
    index = file.whole()
    magic, version, code, sequences, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1 or code not in TOKEN_TYPES:
        raise UserError(f"{file.name} is no index of token files; give the prefix of a .bin/.idx")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if file.size < expected:
        raise UserError(
            f"{file.name} is truncated: it has {file.size} bytes of {expected} for its {sequences} "
            f"sequences; {_REMEDY}"
        )
    if sequences == 0:
        raise UserError(f"{file.name} describes no documents; training needs at least one")
    parts = _Parts(index)
    lengths = parts.take("<i4", sequences)
    offsets = parts.take("<i8", sequences)
    ends = parts.take("<i8", boundaries)
    last = int(ends[-1]) if boundaries else 0
    if last != sequences:
        raise UserError(
            f"{file.name} contradicts itself: its documents end at sequence {last} of {sequences}; "
            f"{_REMEDY}"
        )
    dtype: np.dtype[np.generic] = np.dtype(TOKEN_TYPES[code])
    tokens = int(offsets[-1]) // dtype.itemsize + int(lengths[-1])
    facts = TokenFile(prefix, int(boundaries) - 1, tokens, dtype)
    return OpenPair(facts, tokens_file, index, lengths, offsets, ends)


class _Parts:
    """Takes arrays off the bytes of an index, one after the other."""

    def __init__(self, index: NDArray[np.uint8]) -> None:
        self._index = index
        self._position = HEADER.size

    def take(self, dtype: str, count: int) -> NDArray[Any]:
        found = np.frombuffer(self._index, dtype=dtype, count=count, offset=self._position)
        self._position += found.nbytes
        return found


def _check_vocabulary(facts: TokenFile, file: File, vocab_size: int) -> None:
    pieces = _REMOTE_BLOCKS if is_remote(facts.prefix) else 64
    for part in _spaced_parts(facts, file, at_most=1024 * pieces, pieces=pieces):
        if (place := place_beyond(part, vocab_size)) is not None:
            raise beyond_vocabulary(file.name, f"token {part[place]}", vocab_size)


def spaced_parts(
    file: TokenFile, at_most: int, pieces: int = 64, *, remote: Remote | None = None
) -> Iterator[NDArray[np.int64]]:
    """Yield all tokens of a verified file or, of a longer one, evenly spaced parts of it."""
    return _spaced_parts(file, open_file(f"{file.prefix}.bin", remote), at_most, pieces)


def _spaced_parts(
    facts: TokenFile, file: File, at_most: int, pieces: int
) -> Iterator[NDArray[np.int64]]:
    if facts.tokens <= at_most:
        size = 2**20  # bounds the memory
        starts = list(range(0, facts.tokens, size))
    else:
        size = max(1, at_most // pieces)
        starts = [(facts.tokens - size) * piece // (pieces - 1) for piece in range(pieces)]
    width = facts.dtype.itemsize
    for start in starts:
        stop = min(facts.tokens, start + size)
        yield file.peek(start * width, stop * width).view(facts.dtype).astype(np.int64)


def place_beyond(ids: NDArray[np.int64], vocab_size: int) -> int | None:
    """Return the place of the first id that a vocabulary lacks, None if it has all of them."""
    if not ids.size or np.maximum.reduce(ids.view(np.uint64)) < vocab_size:  # -1 is 2**64 - 1
        return None
    return int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])


def beyond_vocabulary(where: str, token: str, vocab_size: int) -> UserError:
    """Say that files hold a token that the vocabulary lacks."""
    error = UserError(
        f"{where} holds {token}, but the vocabulary ends at {vocab_size - 1}; these files come "
        "from another tokenizer: set data.tokenizer to the one that made them, or tokenize again"
    )
    error.of_content = True
    return error


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
        for part in _chunks(lengths):
            file.write(part.astype("<i4").tobytes())
        offset = 0
        for part in _chunks(lengths):
            ends = offset + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            starts = ends - part.astype(np.int64) * dtype.itemsize
            file.write(starts.astype("<i8").tobytes())
            offset = int(ends[-1])
        if boundaries is not None:
            for bounds in _chunks(boundaries):
                file.write(bounds.astype("<i8").tobytes())
            return
        for start in range(0, count, _CHUNK):
            file.write(np.arange(start, min(start + _CHUNK, count), dtype="<i8").tobytes())


def _chunks[T: np.generic](array: NDArray[T]) -> Iterator[NDArray[T]]:
    for start in range(0, len(array), _CHUNK):
        yield array[start : start + _CHUNK]


def dtype_for(vocab_size: int) -> np.dtype[np.generic]:
    """Return the type of ids: two bytes where the vocabulary allows, else four."""
    return np.dtype("<u2") if vocab_size < _LARGEST_SHORT_VOCABULARY else np.dtype("<i4")


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; as fast as the disk with SHA instructions."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
