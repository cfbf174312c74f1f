"""Gateway to `zstandard`, with gzip beside it: packed files as streams of bytes."""

import enum
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from hybrid_train.schema.problems import UserError

_READ_BYTES = 2**20


class Compression(enum.Enum):
    """How a file is packed; the value is how its bytes begin."""

    none = b""
    gzip = b"\x1f\x8b"
    zstd = b"\x28\xb5\x2f\xfd"


@contextmanager
def opened(path: str, compression: Compression) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file; yield the stream of its content, and the file, whose position is progress.

    Raises:
        UserError: if it is damaged or cannot be read, which is met while it is read.
    """
    try:
        with Path(path).open("rb", buffering=_READ_BYTES) as file:
            yield _stream(file, compression), file
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}; copy it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _stream(file: BinaryIO, compression: Compression) -> BinaryIO:
    if compression is Compression.gzip:
        return cast("BinaryIO", gzip.GzipFile(fileobj=file))
    if compression is Compression.zstd:
        unpacked = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return cast("BinaryIO", io.BufferedReader(unpacked, _READ_BYTES))
    return file
