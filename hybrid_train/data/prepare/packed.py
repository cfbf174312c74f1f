"""Gateway to `zstandard`, with gzip beside it: packed files as streams of bytes."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from hybrid_train.config.problems import UserError
from hybrid_train.data.prepare.sources import Compression

_READ_BYTES = 2**20


@contextmanager
def opened(path: str, compression: Compression) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file; yield the stream of its content, and the file, whose position is progress.

    Raises:
        UserError: if it is damaged, which is met while it is read.
    """
    with Path(path).open("rb", buffering=_READ_BYTES) as file:
        try:
            yield _stream(file, compression), file
        except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
            raise UserError(f"{path} is damaged or cut off: {error}; copy it again") from error


def _stream(file: BinaryIO, compression: Compression) -> BinaryIO:
    if compression is Compression.gzip:
        return cast("BinaryIO", gzip.GzipFile(fileobj=file))
    if compression is Compression.zstd:
        unpacked = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return cast("BinaryIO", io.BufferedReader(unpacked, _READ_BYTES))
    return file
