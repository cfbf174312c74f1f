"""Sources to blocks: the pieces of work, the same and in the same order whoever does them.

A worker reads its own range of a plain file. Packed files and Parquet are read here and handed
over, since nobody can begin in the midst of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from hybrid_train.data.prepare.packed import Compression, opened
from hybrid_train.data.prepare.parquet import column_blocks
from hybrid_train.data.prepare.sources import Source
from hybrid_train.schema.prepare import Format


@dataclass(frozen=True)
class Block:
    """A piece of work.

    Attributes:
        source: number of its source.
        number: within the source.
        bytes_read: of the source on disk, when this block is done.
        span: of a plain file of lines: first byte and the one behind the last. The lines that
            begin within it belong to the block.
        files: whole files, each a document.
        lines: whole lines of a packed file.
        rows: packed rows of Parquet.
    """

    source: int
    number: int
    bytes_read: int
    span: tuple[int, int] | None = None
    files: tuple[str, ...] = ()
    lines: bytes | None = None
    rows: bytes | None = None


def all_blocks(
    sources: Sequence[Source], key: str, block_bytes: int, start: tuple[int, int] = (0, 0)
) -> Iterator[Block]:
    """Yield the blocks of all sources from a position on: source, and block within it.

    Raises:
        UserError: if a source cannot be read.
    """
    for index in range(start[0], len(sources)):
        skip = start[1] if index == start[0] else 0
        yield from source_blocks(sources[index], index, key, block_bytes, skip)


def source_blocks(
    source: Source, index: int, key: str, block_bytes: int, skip: int = 0
) -> Iterator[Block]:
    """Yield the blocks of one source but for the first `skip`."""
    if source.format is Format.parquet:
        yield from _parquet(source, index, key, block_bytes, skip)
    elif source.files:
        yield from _files(source, index, block_bytes, skip)
    elif source.compression is Compression.none:
        for number, start in enumerate(range(0, source.size, block_bytes)):
            end = min(start + block_bytes, source.size)
            if number >= skip:
                yield Block(index, number, end, span=(start, end))
    else:
        yield from _packed_lines(source, index, block_bytes, skip)


def _parquet(source: Source, index: int, key: str, block_bytes: int, skip: int) -> Iterator[Block]:
    packed = column_blocks(source.path, key, block_bytes, skip)
    for number, (rows, share) in enumerate(packed, skip):
        yield Block(index, number, round(share * source.size), rows=rows)


def _files(source: Source, index: int, block_bytes: int, skip: int) -> Iterator[Block]:
    number, done, size = 0, 0, 0
    paths: list[str] = []
    for position, (path, num_bytes) in enumerate(source.files, start=1):
        paths.append(path)
        size += num_bytes
        if size >= block_bytes or position == len(source.files):
            done += size
            if number >= skip:
                yield Block(index, number, done, files=tuple(paths))
            number, size, paths = number + 1, 0, []


def _packed_lines(source: Source, index: int, block_bytes: int, skip: int) -> Iterator[Block]:
    with opened(source.path, source.compression) as (stream, file):
        for number, lines in enumerate(_line_blocks(stream, block_bytes)):
            if number >= skip:
                yield Block(index, number, file.tell(), lines=lines)


def _line_blocks(stream: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    """Cut a stream behind the last line end of each stretch of `block_bytes`."""
    rest: list[bytes] = []
    while part := stream.read(block_bytes):
        cut = part.rfind(b"\n") + 1
        if not cut:  # within a line that is longer than a block
            rest.append(part)
            continue
        yield b"".join([*rest, part[:cut]])
        rest = [part[cut:]] if cut < len(part) else []
    if rest:
        yield b"".join(rest)
