"""The items of a checkpoint's files: tensors as `torch.save` writes them, each a small zip archive.

The pickle in an archive is never run. It is compared with the only one that a plain tensor of that
format and shape has; then the values are read where they lie.
"""

import functools
import io
import math
import pickletools
import struct
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_SMALL_PICKLE = 4096  # bytes; that of a plain tensor has some 160
_LARGEST_MODEL = 64 * 2**20  # bytes of an item for which one of zeros is made, to compare with
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip entry, up to the lengths of name and extra
_saving = threading.Lock()  # torch.save takes its checksum option from a global of torch
_STORAGES = {
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.float64: "DoubleStorage",
}


# Reads so many bytes from a position of a file on: os.pread, its file given.
type ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Part:
    """Where an item lies in its file, and what the index says that it is."""

    offset: int
    length: int
    dtype: torch.dtype
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.sizes) * self.dtype.itemsize


def saved(content: object, *, checksums: bool = True) -> bytes:
    """Return what torch.save writes; without checksums it does not depend on a tensor's values."""
    buffer = io.BytesIO()
    with _saving:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(checksums)
        try:
            torch.save(content, buffer)
        finally:
            torch.serialization.set_crc32_options(before)
    return buffer.getvalue()


@functools.lru_cache(maxsize=256)
def around(dtype: torch.dtype, sizes: tuple[int, ...], *, checksums: bool) -> tuple[bytes, bytes]:
    """Return what torch.save writes before and behind the values of a tensor."""
    content = saved(torch.zeros(sizes, dtype=dtype), checksums=checksums)
    part = Part(0, len(content), dtype, sizes)
    start = _parsed_start(lambda number, at: content[at : at + number], part)
    return content[:start], content[start + part.num_bytes :]


def start_of_values(read: ReadAt, part: Part) -> int:
    """Find the byte of the file at which the values of an item begin.

    Raises:
        ValueError: if the item is anything but one plain tensor of that format and shape.
    """
    if part.dtype not in _STORAGES:
        raise ValueError(f"weights are not of the format {part.dtype}")
    if part.num_bytes <= min(part.length, _LARGEST_MODEL):
        for checksums in (False, True):
            before, _ = around(part.dtype, part.sizes, checksums=checksums)
            whole = len(before) + part.num_bytes <= part.length
            if whole and read(len(before), part.offset) == before:
                return part.offset + len(before)
    try:
        return _parsed_start(read, part)
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError) as error:
        raise ValueError(str(error)) from error


def _parsed_start(read: ReadAt, part: Part) -> int:
    """Find the values by the directory of the archive."""
    dtype, sizes = part.dtype, part.sizes
    view = _View(read, part.offset, part.length)
    with zipfile.ZipFile(view) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    values, pickled = entries.get("data/0"), entries.get("data.pkl")
    if values is None or pickled is None:
        raise ValueError("it is no tensor that torch.save wrote")
    if values.compress_type or values.file_size != math.prod(sizes) * dtype.itemsize:
        raise ValueError(f"it has {values.file_size} bytes, which is no {dtype} {tuple(sizes)}")
    if pickled.compress_type or pickled.file_size > _SMALL_PICKLE:
        raise ValueError("it is more than a tensor")
    view.seek(_start_of_entry(view, pickled))
    _require_plain_tensor(view.read(pickled.file_size), dtype, sizes)
    start = _start_of_entry(view, values)
    if start + values.file_size > part.length:
        raise ValueError("its values end behind it")
    return part.offset + start


def _start_of_entry(view: "_View", entry: zipfile.ZipInfo) -> int:
    view.seek(entry.header_offset)
    name, extra = _LOCAL_HEADER.unpack(view.read(_LOCAL_HEADER.size))
    return entry.header_offset + _LOCAL_HEADER.size + name + extra


def _require_plain_tensor(pickled: bytes, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """Compare what a pickle says, opcode by opcode, with a contiguous tensor in its own storage."""
    said = [
        argument for opcode, argument, _ in pickletools.genops(pickled)
        if argument is not None and opcode.name not in ("PROTO", "BINPUT", "LONG_BINPUT", "BINGET")
    ]  # fmt: skip
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    expected = [
        "torch._utils _rebuild_tensor_v2", "storage", f"torch {_STORAGES.get(dtype)}", "0", "cpu",
        math.prod(sizes), 0, *sizes, *strides, "collections OrderedDict",
    ]  # fmt: skip
    if said != expected:
        raise ValueError(f"it is no plain contiguous {dtype} tensor of shape {tuple(sizes)}")


class _View(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, read: ReadAt, start: int, length: int) -> None:
        self._read, self._start, self._length, self._at = read, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("it points before its own beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        number = max(0, min(len(buffer), self._length - self._at))
        data = self._read(number, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
