"""Tensors of a checkpoint one part at a time, without a model and without reading the whole.

A checkpoint is torch's distributed format as Megatron writes it: an index, and files of items that
`torch.save` wrote. The bytes of an item are read where they lie; its pickle is compared with the
only one that a plain tensor has, and is never run.
"""

import io
import json
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Sequence
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
from hybrid_train.config.problems import UserError

FILE_BYTES = 4 * 2**30  # a new file begins behind so many
_SMALL_PICKLE = 4096  # bytes; that of a plain tensor has some 160
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip entry, up to the lengths of name and extra
_STORAGES = {
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.float64: "DoubleStorage",
}


class StoredTensors:
    """The tensors of a checkpoint; any rows of any of them can be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _require_format(folder)
        self._metadata = safe_metadata.read(folder)
        self._entries = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._files: dict[str, IO[bytes]] = {}
        self._starts: dict[MetadataIndex, int] = {}  # of the bytes of items that were read before

    @property
    def names(self) -> set[str]:
        """Names of all tensors, those of the optimizer included."""
        return set(self._entries)

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
        for chunk in entry.chunks:
            first, size = chunk.offsets[0], chunk.sizes[0]
            low, high = max(start, first), min(stop, first + size)
            if low >= high:
                continue
            place = rows[low - start : high - start]
            for axis, (offset, length) in enumerate(
                zip(chunk.offsets[1:], chunk.sizes[1:], strict=True), start=1
            ):
                place = place.narrow(axis, offset, length)
            self._read_into(place, name, chunk, low - first)
        return rows

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

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
        if info.relative_path not in self._files:
            path = self.folder / info.relative_path
            self._files[info.relative_path] = path.open("rb", buffering=0)
        file = self._files[info.relative_path]
        if index not in self._starts:
            try:
                self._starts[index] = _start_of_values(file, info, dtype, chunk.sizes)
            except (ValueError, zipfile.BadZipFile, struct.error, EOFError) as error:
                raise UserError(f"{self.where(name)} is damaged: {error}") from error
        row_bytes = math.prod(chunk.sizes[1:]) * dtype.itemsize
        file.seek(self._starts[index] + row * row_bytes)
        target = place if place.is_contiguous() else torch.empty(place.shape, dtype=dtype)
        if not fill(file, target):
            raise UserError(f"{self.where(name)} is cut short")
        if target is not place:
            place.copy_(target)


def fill(file: IO[bytes], tensor: Tensor) -> bool:
    """Read the bytes of a contiguous tensor; False if the file ends before."""
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    while len(view):
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            return False
        view = view[got:]
    return True


def _start_of_values(file: IO[bytes], info: Any, dtype: torch.dtype, sizes: Sequence[int]) -> int:
    """Find the byte at which the values of an item begin.

    Raises:
        ValueError: if the item is anything but one plain tensor of that format and shape.
    """
    view = _View(file, info.offset, info.length)
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
    if start + values.file_size > info.length:
        raise ValueError("its values end behind it")
    return int(info.offset) + start


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

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

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
        self._file.seek(self._start + self._at)
        data = self._file.read(number)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass
class _Growing:
    """What the index will say of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[ChunkStorageMetadata]


class CheckpointWriter:
    """Writes a checkpoint part by part, as Megatron would have written it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, _Growing] = {}
        self._places: dict[MetadataIndex, Any] = {}
        self._number = -1
        self._open_next()

    def _open_next(self) -> None:
        self._number += 1
        self._name = f"__0_{self._number}.distcp"
        self._file = (self._folder / self._name).open("wb")

    def add(self, name: str, shape: tuple[int, ...], start: int, rows: Tensor) -> None:
        """Write rows of a tensor, which begin at row `start` of its whole shape."""
        growing = self._tensors.setdefault(name, _Growing(rows.dtype, shape, []))
        offsets = torch.Size((start, *(0 for _ in shape[1:])))
        growing.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=rows.shape))
        self._save(MetadataIndex(name, offsets), rows)

    def _save(self, index: MetadataIndex, content: Any) -> None:
        start = self._file.tell()
        if start > FILE_BYTES:
            self._file.close()
            self._open_next()
            start = 0
        torch.save(content, self._file)
        length = self._file.tell() - start
        self._places[index] = filesystem._StorageInfo(self._name, start, length)

    def finish(self) -> None:
        """Write the index; the checkpoint is whole then."""
        self._save(MetadataIndex(safe_metadata.COMMON), [{}])
        entries: dict[str, Any] = {safe_metadata.COMMON: BytesStorageMetadata()}
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
        """Close the file that is being written."""
        self._file.close()


_FORMAT, _BACKEND = "metadata.json", "torch_dist"  # Megatron's words


def _require_format(folder: Path) -> None:
    path = folder / _FORMAT
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say which format the checkpoint has: {error}") from error
    if backend != _BACKEND:
        raise UserError(f"{path}: the format {backend!r} is not read, only {_BACKEND}")
