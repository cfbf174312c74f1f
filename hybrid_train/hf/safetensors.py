"""The safetensors format: headers that are checked against their file, rows, files as a stream.

By hand since the library of that name holds every tensor of a file that it writes, maps the files
that it reads, and does not name the tensor that is wrong: a conversion, which needs a few rows at
a time, would read at half and write at a third of the speed and need the memory of a whole file
(`tests/benchmarks/by_library.py tensors`, docs/measured.md).
The format: 8 bytes with the length of a JSON header, the header, then the values without a gap.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_train.checkpoint.tensor_files import FilePosition, OpenFiles, write_at
from hybrid_train.schema.problems import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the format
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file at which its values begin

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def read(self, files: OpenFiles, start: int, stop: int) -> Tensor:
        """Read rows [start, stop)."""
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if not files.fill(self.file, self.start + start * row_bytes, rows):
            raise UserError(f"{self} is cut short")
        return rows


def read_header(path: Path) -> dict[str, Entry]:
    """Read what a file says it holds, and check that it can.

    Raises:
        UserError: if the header or the file is damaged, or a tensor has a format of another kind.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _LONGEST_HEADER):
            raise UserError(
                f"{path}: its header says it is {length} bytes long, but the file has {size}; it "
                "is cut short or no safetensors file"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _without_doubles(path, pairs))
        if not isinstance(header, dict):
            raise TypeError("it is no table of tensors")
        header.pop("__metadata__", None)
        begin = _LENGTH_BYTES + length
        entries = {name: _entry(path, name, said, begin) for name, said in header.items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its header is damaged: {error}") from error
    _require_no_gap(path, entries, begin, size)
    return entries


def _without_doubles(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: {double} stands in its header twice")
    return found


def _entry(path: Path, name: str, said: Any, begin: int) -> Entry:
    """Check what the header says of one tensor by itself."""
    if not isinstance(said, dict) or not {"dtype", "shape", "data_offsets"} <= said.keys():
        raise UserError(f"{path}: {name} has no dtype, shape or data_offsets in the header")
    if said["dtype"] not in DTYPES:
        raise UserError(
            f"{path}: {name} has the format {said['dtype']}; only {', '.join(DTYPES)} are read, so "
            "a quantized checkpoint must be converted back first"
        )
    dtype, shape, offsets = DTYPES[said["dtype"]], said["shape"], said["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:  # noqa: PLR2004  begin, end
        raise UserError(f"{path}: {name} has shape {shape} and data_offsets {offsets}")
    needed = math.prod(shape) * dtype.itemsize
    if not needed:
        raise UserError(f"{path}: {name} has shape {tuple(shape)}, which holds nothing")
    if offsets[1] - offsets[0] != needed:
        raise UserError(
            f"{path}: {name} has {offsets[1] - offsets[0]} bytes, but {said['dtype']} "
            f"{tuple(shape)} needs {needed}"
        )
    return Entry(path, name, dtype, tuple(shape), begin + offsets[0])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _require_no_gap(path: Path, entries: Mapping[str, Entry], begin: int, size: int) -> None:
    """The values follow each other from the header to the end of the file."""
    at = begin
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.shape)):
        if entry.start != at:
            what = "overlaps the one before" if entry.start < at else "lies behind a gap"
            raise UserError(f"{entry} {what}, at byte {entry.start} of the file instead of {at}")
        at += math.prod(entry.shape) * entry.dtype.itemsize
        if at > size:
            raise UserError(f"{entry} is cut short: it ends at byte {at}, the file at {size}")
    if at != size:
        raise UserError(f"{path} has {size - at} bytes behind its last tensor")


class Writer:
    """Writes one file part by part.

    The places of the parts are given out in the order of the header; then they may be written in
    any order.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape) in tensors.items():
            end = at + math.prod(shape) * dtype.itemsize
            offsets = [at, end]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file = path.open("wb", buffering=0)
        start = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        write_at(self._file.fileno(), 0, [start])
        self._next, self._end = len(start), len(start) + at

    def place(self, num_bytes: int) -> FilePosition:
        """Give the place of the next values."""
        place = FilePosition(self._file.fileno(), self._next)
        self._next += num_bytes
        return place

    def close(self, *, whole: bool = True) -> None:
        """Close the file; it is whole unless the writing failed."""
        self._file.close()
        assert not whole or self._next == self._end, f"{self._end - self._next} bytes are missing"
