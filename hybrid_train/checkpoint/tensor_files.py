"""Tensors of a checkpoint one part at a time, without a model and without reading the whole.

A checkpoint is torch's distributed format as Megatron writes it: an index (`safe_metadata.py`) and
files of items, tensors as `torch.save` writes them, each a small zip archive. The pickle in an
archive is never run. It is compared with the only one that a plain tensor of that format and shape
has; then the values are read where they lie.

`torch.load(weights_only=True)` would be shorter. It reads an item of the file as a whole, so that a
conversion would hold the largest tensor in memory (benchmarks/by_library.py).
"""

import functools
import io
import json
import math
import os
import pickle
import pickletools
import struct
import threading
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from hybrid_train.checkpoint import safe_metadata
from hybrid_train.schema.problems import UserError

FILE_BYTES = 4 * 2**30  # of a file that is written; a new one begins behind so many
_FORMAT, _BACKEND = "metadata.json", "torch_dist"  # Megatron's words
_BESIDE_WEIGHTS = ("optimizer.", "random.", "hidden_projections.")  # of a training alone
_SMALL_PICKLE = 4096  # bytes; that of a plain tensor has some 160
_LARGEST_COMPARED = 8 * 2**20  # bytes of an item for which one of zeros is made, to compare with
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip entry, up to the lengths of name and extra
_STORAGES = {
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.float64: "DoubleStorage",
    torch.int64: "LongStorage",  # of counters, which are written here and not read
}
# Linux keeps what is written at once in one piece of memory if it can. A virtual machine gives its
# large pieces back while they are free; 2 GB in pieces of 1 MB and more took 5 times as long as in
# these, which a copy by the system uses too.
_WRITTEN_AT_ONCE = 2**18
_saving = threading.Lock()  # torch.save takes its checksum option from a global of torch
# Reads so many bytes from a position of a file on: os.pread, its file given.
type ReadAt = Callable[[int, int], bytes]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class OpenFiles:
    """Files that are opened when they are first read, and stay open."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __getitem__(self, path: Path) -> int:
        with self._opening:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def fill(self, path: Path, position: int, tensor: Tensor) -> bool:
        """Read the bytes of a contiguous tensor; False if the file ends before."""
        descriptor, view = self[path], bytes_of(tensor)
        while len(view):
            got = os.preadv(descriptor, [view], position)
            if not got:
                return False
            view, position = view[got:], position + got
        return True

    def close(self) -> None:
        """Close all of them."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


@dataclass(frozen=True)
class FilePosition:
    """Where the values of a tensor will stand in an open file, and what stands around them."""

    descriptor: int
    position: int
    before: bytes = b""
    behind: bytes = b""

    def write(self, values: Tensor) -> None:
        """Write the values, and what stands around them."""
        around = self.before, bytes_of(values.contiguous()), self.behind
        write_at(self.descriptor, self.position, around)


def write_at(descriptor: int, position: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write parts one behind the other, all bytes of them."""
    for part in parts:
        left = memoryview(part)
        while len(left):
            done = os.pwrite(descriptor, left[:_WRITTEN_AT_ONCE], position)
            left, position = left[done:], position + done


class StoredTensors:
    """The tensors of a checkpoint; any rows of any of them can be read.

    Args:
        folder: of the checkpoint.
        foreign: another program wrote it; see `safe_metadata.read`.
    """

    def __init__(self, folder: Path, *, foreign: bool = False) -> None:
        self.folder = folder
        _require_format(folder)
        self._metadata = safe_metadata.read(folder, foreign=foreign)
        self._entries = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._files = OpenFiles()
        self._sorted: dict[str, tuple[list[int], list[ChunkStorageMetadata], int]] = {}
        self._starts: dict[MetadataIndex, int] = {}  # of the bytes of items that were read before

    @property
    def names(self) -> set[str]:
        """Names of all tensors, those of the optimizer included."""
        return set(self._entries)

    @property
    def weights(self) -> set[str]:
        """Names of the weights of the model."""
        return {name for name in self._entries if not name.startswith(_BESIDE_WEIGHTS)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self._entries[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format of a tensor."""
        return self._entries[name].properties.dtype

    def where(self, name: str) -> str:
        """Name file and tensor, for errors."""
        chunk = self._entries[name].chunks[0]
        info = self._info(MetadataIndex(name, chunk.offsets))
        return f"{self.folder / info.relative_path}: {name}"

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor, whatever parts it was saved in.

        Raises:
            UserError: if an item is not what the index says.
        """
        entry = self._entries[name]
        rows = torch.empty((stop - start, *entry.size[1:]), dtype=entry.properties.dtype)
        for chunk in self._chunks_from(name, start, stop):
            first, size = chunk.offsets[0], chunk.sizes[0]
            low, high = max(start, first), min(stop, first + size)
            if low >= high:
                continue
            place = rows[low - start : high - start]
            for axis, (offset, length) in enumerate(
                zip(chunk.offsets[1:], chunk.sizes[1:], strict=True), start=1
            ):
                if length != place.shape[axis]:
                    place = place.narrow(axis, offset, length)
            self._read_into(place, name, chunk, low - first)
        return rows

    def saved(self, name: str) -> bytes | None:
        """Return the bytes of an item that is no tensor; None if there is none of that name."""
        index = MetadataIndex(name)
        if index not in self._metadata.storage_data:
            return None
        info = self._info(index)
        return os.pread(self._files[self.folder / info.relative_path], info.length, info.offset)

    def _chunks_from(self, name: str, start: int, stop: int) -> list[ChunkStorageMetadata]:
        """Return the chunks that may hold some of the rows [start, stop)."""
        if name not in self._sorted:
            chunks = sorted(self._entries[name].chunks, key=lambda chunk: chunk.offsets[0])
            most = max(chunk.sizes[0] for chunk in chunks)
            self._sorted[name] = [chunk.offsets[0] for chunk in chunks], chunks, most
        firsts, chunks, most = self._sorted[name]
        return chunks[bisect_left(firsts, start - most + 1) : bisect_left(firsts, stop)]

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _info(self, index: MetadataIndex) -> Any:
        return self._metadata.storage_data[index]

    def _read_into(self, place: Tensor, name: str, chunk: ChunkStorageMetadata, row: int) -> None:
        """Fill rows of the result with those of a chunk, from its row on."""
        index = MetadataIndex(name, chunk.offsets)
        info, dtype = self._info(index), place.dtype
        path = self.folder / info.relative_path
        if index not in self._starts:
            item = StoredItem(info.offset, info.length, dtype, tuple(chunk.sizes))
            read = functools.partial(os.pread, self._files[path])
            try:
                self._starts[index] = start_of_values(read, item)
            except ValueError as error:
                raise UserError(f"{self.where(name)} is damaged: {error}") from error
        row_bytes = math.prod(chunk.sizes[1:]) * dtype.itemsize
        target = place if place.is_contiguous() else torch.empty(place.shape, dtype=dtype)
        if not self._files.fill(path, self._starts[index] + row * row_bytes, target):
            raise UserError(f"{self.where(name)} is cut short")
        if target is not place:
            place.copy_(target)


def _require_format(folder: Path) -> None:
    path = folder / _FORMAT
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say which format the checkpoint has: {error}") from error
    if backend != _BACKEND:
        raise UserError(f"{path}: the format {backend!r} is not read, only {_BACKEND}")


class CheckpointWriter:
    """Writes a checkpoint part by part, as Megatron would have written it.

    The places of the parts are given out in order; then they may be written in any order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, _Growing] = {}
        self._items: list[str] = []  # that are no tensors
        self._places: dict[MetadataIndex, Any] = {}
        self._opened: list[IO[bytes]] = []
        self._number = -1
        self._open_next()

    def _open_next(self) -> None:
        self._number += 1
        self._name = f"__0_{self._number}.distcp"
        self._file = (self._folder / self._name).open("wb", buffering=0)
        self._opened.append(self._file)
        self._end = 0

    def place(
        self, name: str, shape: tuple[int, ...], start: int, sizes: tuple[int, ...],
        dtype: torch.dtype,
    ) -> FilePosition:  # fmt: skip
        """Give the place of rows of a tensor.

        Args:
            name: of the tensor.
            shape: of the whole tensor.
            start: the first row.
            sizes: shape of the rows.
            dtype: number format of all rows.
        """
        growing = self._tensors.setdefault(name, _Growing(dtype, shape, []))
        offsets = torch.Size((start, *(0 for _ in shape[1:])))
        growing.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(sizes)))
        before, behind = bytes_around(dtype, sizes, checksums=False)
        values = math.prod(sizes) * dtype.itemsize
        position = self._take(MetadataIndex(name, offsets), len(before) + values + len(behind))
        return FilePosition(self._file.fileno(), position, before, behind)

    def _take(self, index: MetadataIndex, length: int) -> int:
        """Give the next bytes of the file to an item, and return where they begin."""
        if self._end > FILE_BYTES:
            self._open_next()
        start = self._end
        self._end += length
        self._places[index] = filesystem._StorageInfo(self._name, start, length)
        return start

    def put(self, name: str, content: object) -> None:
        """Write an item that is no tensor, at once."""
        saved = torch_saved(content)
        position = self._take(MetadataIndex(name), len(saved))
        write_at(self._file.fileno(), position, [saved])
        self._items.append(name)

    def finish(self, common: Mapping[str, Any] | None = None) -> None:
        """Write the index; the checkpoint is whole then, if all parts were written.

        Args:
            common: what Megatron keeps beside tensors; ours is empty.
        """
        self.put(safe_metadata.COMMON, [dict(common or {})])
        entries: dict[str, Any] = {name: BytesStorageMetadata() for name in self._items}
        for name, one in self._tensors.items():
            properties = TensorProperties(one.dtype)
            entries[name] = TensorStorageMetadata(properties, torch.Size(one.shape), one.chunks)
        metadata = Metadata(
            state_dict_metadata=entries, storage_data=self._places, storage_meta=StorageMeta(),
            version=filesystem.CURRENT_DCP_VERSION,
        )  # fmt: skip
        with (self._folder / safe_metadata.INDEX).open("wb") as file:
            pickle.dump(metadata, file)
        text = json.dumps({"sharded_backend": _BACKEND, "sharded_backend_version": 1})
        (self._folder / _FORMAT).write_text(text, encoding="utf-8")
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._opened:
            file.close()


@dataclass
class _Growing:
    """What the index will say of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[ChunkStorageMetadata]


@dataclass(frozen=True)
class StoredItem:
    """Where an item lies in its file, and what the index says that it is."""

    offset: int
    length: int
    dtype: torch.dtype
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.sizes) * self.dtype.itemsize


def torch_saved(content: object, *, checksums: bool = True) -> bytes:
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
def bytes_around(
    dtype: torch.dtype, sizes: tuple[int, ...], *, checksums: bool
) -> tuple[bytes, bytes]:
    """Return what torch.save writes before and behind the values of a tensor."""
    content = torch_saved(torch.zeros(sizes, dtype=dtype), checksums=checksums)
    item = StoredItem(0, len(content), dtype, sizes)
    start = _parsed_start(lambda number, at: content[at : at + number], item)
    return content[:start], content[start + item.num_bytes :]


def start_of_values(read: ReadAt, item: StoredItem) -> int:
    """Find the byte of the file at which the values of an item begin.

    Raises:
        ValueError: if the item is anything but one plain tensor of that format and shape.
    """
    if item.dtype not in _STORAGES or not item.dtype.is_floating_point:
        raise ValueError(f"weights are not of the format {item.dtype}")
    if item.num_bytes <= min(item.length, _LARGEST_COMPARED):
        for checksums in (False, True):
            before, _ = bytes_around(item.dtype, item.sizes, checksums=checksums)
            whole = len(before) + item.num_bytes <= item.length
            if whole and read(len(before), item.offset) == before:
                return item.offset + len(before)
    try:
        return _parsed_start(read, item)
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError) as error:
        raise ValueError(str(error)) from error


def _parsed_start(read: ReadAt, item: StoredItem) -> int:
    """Find the values by the directory of the archive."""
    dtype, sizes = item.dtype, item.sizes
    view = _View(read, item.offset, item.length)
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
    if start + values.file_size > item.length:
        raise ValueError("its values end behind it")
    return item.offset + start


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
