"""Blocks, the units of work of a tokenization: cut from sources, and read as documents.

The blocks of a source are the same, whoever reads them. A worker reads its own range of a plain
file. Packed files and Parquet are read in the main process and handed over, since nobody can begin
in the midst of them.
"""

import codecs
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import orjson

from hybrid_train.data.prepare.file_kinds import BYTE_ORDER_MARK, Compression, opened
from hybrid_train.data.prepare.inputs import Source
from hybrid_train.schema.prepare import Format

# The longer mark first: that of UTF-32 begins with that of UTF-16.
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_NO_TEXT = "is no UTF-8 text: it has zero bytes, as binary files and UTF-16 have"
_KEPT_BYTES = 4096  # of a bad line; enough to know it again
_READ_BYTES = 2**20
_BINARY_HEAD = 8192  # bytes; a zero byte among them makes a file binary, as git has it


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
    from hybrid_train.data.prepare.parquet import column_blocks  # pyarrow starts a thread

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
    """Cut a stream behind the last line end of each span of `block_bytes`."""
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


@dataclass(frozen=True)
class BadLine:
    r"""A line that holds no document.

    Attributes:
        file: path of the file.
        line: its number (of a row, in Parquet), from 1: within the block as long as nobody knows
            how many come before.
        reason: what is wrong.
        size: bytes of the line.
        text: its beginning; bytes that are no UTF-8 as \xNN.
    """

    file: str
    line: int
    reason: str
    size: int
    text: str


@dataclass
class BlockDocuments:
    """What a block holds."""

    texts: list[str] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    lines: int = 0  # that were met; blank lines are none, and files count as one
    last_line: int = 0  # number of the last line, blank ones included
    empty: int = 0  # documents without a character
    binary: int = 0  # files of source code that are not text


def read_documents(source: Source, block: Block, key: str) -> BlockDocuments:
    """Read the documents of a block, in their order."""
    if block.files:
        return _whole_files(source, block.files)
    if block.rows is not None:
        from hybrid_train.data.prepare.parquet import unpack  # pyarrow starts a thread

        return _rows(source.path, unpack(block.rows))
    data = read_lines(source.path, *block.span) if block.span else block.lines or b""
    lines = data.split(b"\n")
    del data  # a long line would be there twice
    if lines and not lines[-1]:
        lines.pop()  # behind the last line end there is no line
    if source.format is Format.jsonl:
        return _json_lines(source.path, lines, key)
    return _plain_lines(source.path, lines)


def read_lines(path: str, start: int, end: int) -> bytes:
    """Read the lines that begin within [start, end) of a file, the last of them to its end."""
    with Path(path).open("rb") as file:
        file.seek(max(0, start - 1))  # the byte before tells whether a line begins at `start`
        data = file.read(end - file.tell())
        if start:
            data = data[data.find(b"\n") + 1 :] if b"\n" in data else b""
        if not data or data.endswith(b"\n"):
            return data
        parts = [data]
        while part := file.read(_READ_BYTES):
            cut = part.find(b"\n")
            if cut >= 0:
                parts.append(part[: cut + 1])
                break
            parts.append(part)
    return b"".join(parts)


def _json_lines(path: str, lines: list[bytes], key: str) -> BlockDocuments:
    found = BlockDocuments(last_line=len(lines))
    for number, line in enumerate(lines, start=1):
        lines[number - 1] = b""  # a long line and its text need not both stay
        line = line.removeprefix(BYTE_ORDER_MARK)  # of the file, or of one that was joined to it
        try:
            text = orjson.loads(line)[key]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            text = None
        if type(text) is not str:
            if line.strip():
                found.lines += 1
                found.bad.append(_bad(path, number, _json_reason(line, key), line))
            continue
        found.lines += 1
        _add(found, text)
    return found


def _json_reason(line: bytes, key: str) -> str:
    """Say why a line has no text."""
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as wrong:
            return _not_unicode(line, wrong)
        return f"is not JSON: {error}"
    if not isinstance(content, dict):
        return f"is no JSON object but {_kind(content)}"
    if key in content:
        return f"{key!r} is {_kind(content[key])}, not text"
    keys = ", ".join(list(content)[:8])
    return f"has no key {key!r}; it has {keys}" if keys else f"has no key {key!r}, nor any other"


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", dict: "an object", list: "a list", str: "a text"}
    return names.get(type(value), "a number")


def _plain_lines(path: str, lines: Sequence[bytes]) -> BlockDocuments:
    found = BlockDocuments(last_line=len(lines))
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix(BYTE_ORDER_MARK).removesuffix(b"\r")
        if not line.strip():
            continue
        found.lines += 1
        if b"\0" in line and _wide(line) is None:
            found.bad.append(_bad(path, number, _NO_TEXT, line))
        else:
            _decode(found, path, number, line)
    return found


def _rows(path: str, rows: Sequence[bytes | None]) -> BlockDocuments:
    found = BlockDocuments(lines=len(rows), last_line=len(rows))
    for number, row in enumerate(rows, start=1):
        if row is None:
            found.bad.append(_bad(path, number, "is null, not text", b""))
        else:
            _decode(found, path, number, row)
    return found


def _whole_files(source: Source, paths: Sequence[str]) -> BlockDocuments:
    found = BlockDocuments()
    for path in paths:
        with opened(path, source.compression) as (stream, _):
            content = stream.read()
        wide = _wide(content)
        is_binary = wide is None and b"\0" in content[:_BINARY_HEAD]
        if is_binary and source.format is Format.code:
            found.binary += 1
            continue
        found.lines += 1
        if is_binary:
            found.bad.append(_bad(path, 1, _NO_TEXT, content))
            continue
        _decode(found, path, None, content.removeprefix(BYTE_ORDER_MARK), wide or "utf-8")
    return found


def _wide(content: bytes) -> str | None:
    """Return the encoding that a byte order mark tells, unless it is UTF-8."""
    return next((name for mark, name in _WIDE_MARKS.items() if content.startswith(mark)), None)


def _decode(
    found: BlockDocuments, path: str, number: int | None, content: bytes, encoding: str = "utf-8"
) -> None:
    """Add a text; the line of a whole file's fault is that of the fault."""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = number or content.count(b"\n", 0, error.start) + 1
        found.bad.append(_bad(path, line, _not_unicode(content, error), content))
    else:
        _add(found, text)


def _not_unicode(content: bytes, error: UnicodeDecodeError) -> str:
    wide = _wide(content)
    if wide and error.encoding == "utf-8":
        name = wide.upper()
        return f"is {name}, not UTF-8; convert the file: iconv -f {name} -t UTF-8"
    packed = next(
        (one.name for one in Compression if one.value and content[:4].startswith(one.value)), ""
    )
    if packed:
        return f"is no text but packed by {packed}; say so by the suffix of the file"
    return f"is not {error.encoding.upper()}: byte {content[error.start]:#04x} at {error.start}"


def _add(found: BlockDocuments, text: str) -> None:
    if text:
        found.texts.append(text)
    else:
        found.empty += 1


def _bad(path: str, number: int, reason: str, content: bytes) -> BadLine:
    text = content[:_KEPT_BYTES].decode("utf-8", "backslashreplace")
    return BadLine(path, number, reason, len(content), text)


@dataclass
class Sample:
    """Texts of drawn blocks, once through; counts what it has yielded.

    Attributes:
        sources: in their order.
        key: of the text.
        block_bytes: size of a block.
        share: probability of each block.
        seed: of the draw, which depends on nothing else.
    """

    sources: Sequence[Source]
    key: str
    block_bytes: int
    share: float
    seed: int
    documents: int = 0
    characters: int = 0
    bad: int = 0

    def __iter__(self) -> Iterator[str]:
        draw = random.Random(self.seed)
        for index, source in enumerate(self.sources):
            for block in source_blocks(source, index, self.key, self.block_bytes):
                if draw.random() >= self.share:
                    continue
                found = read_documents(source, block, self.key)
                self.bad += len(found.bad)
                for text in found.texts:
                    self.documents += 1
                    self.characters += len(text)
                    yield text
