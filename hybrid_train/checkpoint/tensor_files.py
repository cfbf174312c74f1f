"""Tensors of a checkpoint one part at a time, without a model and without reading the whole.

A checkpoint is torch's distributed format as Megatron writes it: an index
(`checkpoint/safe_metadata.py`) and files of items (`checkpoint/items.py`).
"""

import functools
import json
import math
import os
import pickle
from bisect import bisect_left
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

from hybrid_train.checkpoint import items, safe_metadata
from hybrid_train.checkpoint.positions import OpenFiles, Place, write_at
from hybrid_train.schema.problems import UserError

FILE_BYTES = 4 * 2**30  # a new file begins behind so many


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
        self._files = OpenFiles()
        self._sorted: dict[str, tuple[list[int], list[ChunkStorageMetadata], int]] = {}
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
            part = items.Part(info.offset, info.length, dtype, tuple(chunk.sizes))
            read = functools.partial(os.pread, self._files[path])
            try:
                self._starts[index] = items.start_of_values(read, part)
            except ValueError as error:
                raise UserError(f"{self.where(name)} is damaged: {error}") from error
        row_bytes = math.prod(chunk.sizes[1:]) * dtype.itemsize
        target = place if place.is_contiguous() else torch.empty(place.shape, dtype=dtype)
        if not self._files.fill(path, self._starts[index] + row * row_bytes, target):
            raise UserError(f"{self.where(name)} is cut short")
        if target is not place:
            place.copy_(target)


@dataclass
class _Growing:
    """What the index will say of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[ChunkStorageMetadata]


class CheckpointWriter:
    """Writes a checkpoint part by part, as Megatron would have written it.

    The places of the parts are given out in order; then they may be written in any order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, _Growing] = {}
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
    ) -> Place:  # fmt: skip
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
        before, behind = items.around(dtype, sizes, checksums=False)
        values = math.prod(sizes) * dtype.itemsize
        position = self._take(MetadataIndex(name, offsets), len(before) + values + len(behind))
        return Place(self._file.fileno(), position, before, behind)

    def _take(self, index: MetadataIndex, length: int) -> int:
        """Give the next bytes of the file to an item, and return where they begin."""
        if self._end > FILE_BYTES:
            self._open_next()
        start = self._end
        self._end += length
        self._places[index] = filesystem._StorageInfo(self._name, start, length)
        return start

    def finish(self) -> None:
        """Write the index; the checkpoint is whole then, if all parts were written."""
        common = items.saved([{}])
        position = self._take(MetadataIndex(safe_metadata.COMMON), len(common))
        write_at(self._file.fileno(), position, [common])
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
        """Close the files."""
        for file in self._opened:
            file.close()


_FORMAT, _BACKEND = "metadata.json", "torch_dist"  # Megatron's words


def _require_format(folder: Path) -> None:
    path = folder / _FORMAT
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say which format the checkpoint has: {error}") from error
    if backend != _BACKEND:
        raise UserError(f"{path}: the format {backend!r} is not read, only {_BACKEND}")
