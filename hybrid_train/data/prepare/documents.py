"""Blocks to documents: the text of each, and what was wrong with the lines that have none."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from hybrid_train.data.prepare.blocks import Block
from hybrid_train.data.prepare.file_kinds import BYTE_ORDER_MARK
from hybrid_train.data.prepare.packed import Compression, opened
from hybrid_train.data.prepare.parquet import unpack
from hybrid_train.data.prepare.sources import Source
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
class Documents:
    """What a block holds."""

    texts: list[str] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    lines: int = 0  # that were met; blank lines are none, and files count as one
    last_line: int = 0  # number of the last line, blank ones included
    empty: int = 0  # documents without a character
    binary: int = 0  # files of source code that are not text


def read_documents(source: Source, block: Block, key: str) -> Documents:
    """Read the documents of a block, in their order."""
    if block.files:
        return _whole_files(source, block.files)
    if block.rows is not None:
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


def _json_lines(path: str, lines: list[bytes], key: str) -> Documents:
    found = Documents(last_line=len(lines))
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


def _plain_lines(path: str, lines: Sequence[bytes]) -> Documents:
    found = Documents(last_line=len(lines))
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


def _rows(path: str, rows: Sequence[bytes | None]) -> Documents:
    found = Documents(lines=len(rows), last_line=len(rows))
    for number, row in enumerate(rows, start=1):
        if row is None:
            found.bad.append(_bad(path, number, "is null, not text", b""))
        else:
            _decode(found, path, number, row)
    return found


def _whole_files(source: Source, paths: Sequence[str]) -> Documents:
    found = Documents()
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
    found: Documents, path: str, number: int | None, content: bytes, encoding: str = "utf-8"
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


def _add(found: Documents, text: str) -> None:
    if text:
        found.texts.append(text)
    else:
        found.empty += 1


def _bad(path: str, number: int, reason: str, content: bytes) -> BadLine:
    text = content[:_KEPT_BYTES].decode("utf-8", "backslashreplace")
    return BadLine(path, number, reason, len(content), text)
