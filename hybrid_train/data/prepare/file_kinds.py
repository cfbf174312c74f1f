"""Kinds of files, told by name or content, and packed files as streams (gateway to `zstandard`)."""

import enum
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import orjson
import zstandard

from hybrid_train.schema.prepare import Format
from hybrid_train.schema.problems import UserError

_READ_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BY_NAME = {
    ".jsonl": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".json": Format.jsonl,
    ".parquet": Format.parquet,
    ".txt": Format.text,
}
_OTHER_PACKINGS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "zip"}
_PARQUET = b"PAR1"
_START_BYTES = 64  # of a file; enough for most to be told
_HEAD_BYTES = 2**16  # of a file that may hold JSON lines
_LONG_LINE = 2**23  # bytes of a first line that are looked at


class Compression(enum.Enum):
    """How a file is packed; the value is how its bytes begin."""

    none = b""
    gzip = b"\x1f\x8b"
    zstd = b"\x28\xb5\x2f\xfd"


_PACKED = {".gz": Compression.gzip, ".zst": Compression.zstd}


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


@dataclass(frozen=True)
class Kind:
    """What a file holds, as far as somebody knows.

    Attributes:
        format: None where nothing tells.
        compression: of the file.
        json_lines: lines of JSON objects that were found at its beginning.
        is_empty: whether there is nothing in it.
        packed_by: name of a compression that cannot be read.
    """

    format: Format | None
    compression: Compression
    json_lines: int = 0
    is_empty: bool = False
    packed_by: str = ""


def by_name(path: Path) -> Kind:
    """Tell by the suffix, and the one of a compression behind it; capitals do not matter."""
    name = Path(path.name.lower())
    packed = _PACKED.get(name.suffix, Compression.none)
    inner = Path(name.stem) if packed is not Compression.none else name
    return Kind(_BY_NAME.get(inner.suffix), packed)


def by_content(path: Path) -> Kind:
    """Tell by the first bytes: Parquet, JSON lines, or None for any other; packed ones too.

    Raises:
        UserError: if the file cannot be read, or is damaged.
    """
    with opened(str(path), Compression.none) as (file, _):
        start = file.read(_START_BYTES)
    packed = next(one for one in reversed(Compression) if start.startswith(one.value))
    if start.startswith(_PARQUET):
        return Kind(Format.parquet, packed)
    names = (name for magic, name in _OTHER_PACKINGS.items() if start.startswith(magic))
    may_be_json = packed is not Compression.none or _begins_object(start) or not start.strip()
    lines = _json_lines(str(path), packed) if may_be_json else 0
    return Kind(
        Format.jsonl if lines else None, packed, lines,
        is_empty=not start, packed_by=next(names, ""),
    )  # fmt: skip


def _begins_object(head: bytes) -> bool:
    return head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"{")


def _json_lines(path: str, compression: Compression) -> int:
    """Count lines of JSON objects at the beginning; none unless most lines are."""
    with opened(path, compression) as (file, _):
        head = file.read(_HEAD_BYTES)
        if not _begins_object(head):
            return 0
        if b"\n" not in head:
            head += file.read(_LONG_LINE)
        is_whole = not file.read(1)
    head = head.removeprefix(BYTE_ORDER_MARK)
    lines = [line for line in head.split(b"\n") if line.strip()]
    if len(lines) == 1 and not is_whole and b"\n" not in head:
        return 1  # an object of many megabytes
    judged = lines if is_whole or head.endswith(b"\n") else lines[:-1]
    objects = sum(map(_is_object, judged))
    return objects if 2 * objects > len(judged) else 0


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def require_known_packing(kind: Kind, path: Path) -> None:
    """Refuse a file that is packed in a way that nothing here can unpack.

    Raises:
        UserError: says so.
    """
    if kind.packed_by:
        raise UserError(
            f"{path} is packed by {kind.packed_by}, which is not read here; unpack it, or pack it "
            "with gzip or zstd"
        )
