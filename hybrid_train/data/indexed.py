"""Token files on disk (.bin with the tokens, .idx with their boundaries): check and sample.

Layout of an .idx (megatron-core 0.19.2, `indexed_dataset.py`), little endian:
    magic 9 bytes | version uint64 | dtype code uint8 | sequences S uint64 | boundaries D uint64
    lengths int32[S] | byte offsets int64[S] | document boundaries int64[D]
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hybrid_train.config.problems import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_TYPES = {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_REMEDY = "write the files anew, or copy both from where they are whole"


@dataclass(frozen=True)
class TokenFile:
    """What the index says about one pair of files."""

    prefix: str
    documents: int
    tokens: int
    dtype: np.dtype[np.generic]


def verify(prefix: str, vocab_size: int | None = None) -> TokenFile:
    """Check that both files are there, whole, and belong together; reads a few kilobytes.

    Args:
        prefix: path without .bin or .idx.
        vocab_size: if given, tokens at 64 places of the file must be below it.

    Raises:
        UserError: names the file, what is wrong with it, and what to do.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (idx_path, bin_path):
        if not path.is_file():
            hint = ""
            if prefix.endswith((".bin", ".idx")):
                hint = " (a prefix is written without .bin or .idx)"
            raise UserError(f"{path} does not exist{hint}; check the prefixes of the data section")
    found = _read_index(prefix, idx_path)
    expected, actual = found.tokens * found.dtype.itemsize, bin_path.stat().st_size
    if actual != expected:
        state = "is truncated" if actual < expected else "does not belong to its index"
        raise UserError(
            f"{bin_path} {state}: it has {actual} bytes, {idx_path} describes {expected}; {_REMEDY}"
        )
    if vocab_size is not None:
        _check_vocabulary(found, vocab_size)
    return found


def spread(file: TokenFile, at_most: int, pieces: int = 64) -> Iterator[NDArray[np.int64]]:
    """Yield all tokens of a verified file or, of a longer one, evenly spaced parts of it."""
    tokens = np.memmap(f"{file.prefix}.bin", dtype=file.dtype, mode="r", shape=(file.tokens,))
    if file.tokens <= at_most:
        size = 2**20  # bounds the memory
        starts = list(range(0, file.tokens, size))
    else:
        size = max(1, at_most // pieces)
        starts = [(file.tokens - size) * piece // (pieces - 1) for piece in range(pieces)]
    for start in starts:
        yield tokens[start : start + size].astype(np.int64)


def _read_index(prefix: str, path: Path) -> TokenFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            raise UserError(f"{path} is truncated: it ends within its header; {_REMEDY}")
        magic, version, code, sequences, boundaries = _HEADER.unpack(head)
        if magic != _MAGIC or version != 1 or code not in _TOKEN_TYPES:
            raise UserError(f"{path} is no index of token files; give the prefix of a .bin/.idx")
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if size < expected:
            raise UserError(
                f"{path} is truncated: it has {size} bytes of {expected} for its {sequences} "
                f"sequences; {_REMEDY}"
            )
        if sequences == 0:
            raise UserError(f"{path} describes no documents; training needs at least one")
        length = _integer_at(file, _HEADER.size + 4 * (sequences - 1), 4)
        offset = _integer_at(file, _HEADER.size + 12 * sequences - 8, 8)
        last = _integer_at(file, expected - 8, 8)
    if last != sequences:
        raise UserError(
            f"{path} contradicts itself: its documents end at sequence {last} of {sequences}; "
            f"{_REMEDY}"
        )
    dtype: np.dtype[np.generic] = np.dtype(_TOKEN_TYPES[code])
    return TokenFile(prefix, int(boundaries) - 1, offset // dtype.itemsize + length, dtype)


def _integer_at(file: BinaryIO, position: int, num_bytes: int) -> int:
    file.seek(position)
    return int.from_bytes(file.read(num_bytes), "little", signed=True)


def _check_vocabulary(file: TokenFile, vocab_size: int) -> None:
    for part in spread(file, at_most=64 * 1024):
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{file.prefix}.bin holds token {high if high >= vocab_size else low}, but the "
                f"vocabulary ends at {vocab_size - 1}; these files come from another tokenizer: "
                "set data.tokenizer to the one that made them, or tokenize again"
            )
