"""Reads the index of a checkpoint without running what may be hidden in it.

torch writes `.metadata` as a pickle, and a pickle can call any function. Here an unpickler with a
list of what is allowed admits only the classes that an index is made of, each as a plain record.
No library has the rest, which is most of this file: the record is checked before it is used, so
that a damaged index, or one that points out of its folder, ends in a sentence.
`install` makes torch's own reader, through which Megatron loads, do the same.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from hybrid_train.megatron import written_for
from hybrid_train.schema.problems import UserError

INDEX = ".metadata"
COMMON = "common_state/shard_0_1"  # what Megatron stores beside tensors; ours is empty
OLD_COMMON = "common.pt"  # the same, of an older Megatron
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "float8_e4m3fn", "float8_e5m2"),
)


_Pair = tuple[ChunkStorageMetadata, ChunkStorageMetadata]


class UnreadableError(UserError):
    """A file of a checkpoint is missing, damaged, or asks for more than tensors."""


class _Sealed(type):
    """Metaclass of records: an index cannot change the class itself."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"{cls.__name__} is not to be changed")


class _Record(metaclass=_Sealed):
    """What an object of an index says of itself, not yet checked."""

    state: Any = None

    def __init__(self, *arguments: object) -> None:
        self.state = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


def _layout(_: object) -> None:
    """Stand for torch's lookup of a tensor layout; only dense tensors are stored."""


_RECORDS = {
    name: type(name, (_Record,), {})
    for name in (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        "_StorageInfo",
    )
}
_PLANS = {  # Megatron keeps them in an index whose structure it assumes to be constant
    name: type(name, (_Record,), {})
    for name in (
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesWriteData"),
        "BytesIOWriteData",
    )
}
_ADMITTED: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _RECORDS["_StorageInfo"],
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _layout,
    **{
        ("torch.distributed.checkpoint.metadata", name): record
        for name, record in _RECORDS.items()
        if name != "_StorageInfo"
    },
    **{("torch.distributed.checkpoint.planner", name): one for name, one in _PLANS.items()},
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of an index and no others."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no index of tensors needs"
            ) from None


def read(folder: Path, *, foreign: bool = False) -> Metadata:
    """Read and check the index of a checkpoint.

    Args:
        folder: of the checkpoint.
        foreign: another program wrote it; what lies beside its tensors is not looked at here, and
            is for `nvidia/saved_state.py` to read.

    Raises:
        UnreadableError: if it is missing, damaged, asks for code, or points outside its folder.
    """
    path = folder / INDEX
    if (folder / OLD_COMMON).exists() and not foreign:
        raise UnreadableError(
            f"{folder / OLD_COMMON} is a pickle of an older Megatron, and pickles are not read; "
            "if you trust the checkpoint, remove that file: no weights lie in it"
        )
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        metadata = _Checked(folder).metadata(found)
        if not foreign:
            _require_plain_common(folder, metadata)
        return metadata
    except OSError as error:
        raise UnreadableError(
            f"{error.filename or path} cannot be read: {error.strerror}"
        ) from error
    except UnreadableError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise UnreadableError(f"{path} is damaged or not to be trusted: {error}") from error


class _Checked:
    """Turns records into torch's classes, refusing what does not add up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: dict[str, int] = {}

    def metadata(self, record: Any) -> Metadata:
        tensors = {
            _text(name): self._entry(name, entry)
            for name, entry in _record(record, "Metadata").field("state_dict_metadata").items()
        }
        places: dict[Any, Any] = {}
        for index, info in record.field("storage_data").items():
            place = self._index(index)
            if place in places:
                _refuse(f"{place.fqn} has two items at offset {place.offset}")
            places[place] = self._info(place.fqn, info)
        for name, entry in tensors.items():
            if isinstance(entry, TensorStorageMetadata):
                self._require_whole(name, entry, places)
        return Metadata(
            state_dict_metadata=tensors, storage_data=places, storage_meta=StorageMeta(),
            version=record.field("version"),
        )  # fmt: skip

    def _entry(self, name: str, record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if isinstance(record, _RECORDS["BytesStorageMetadata"]):
            return BytesStorageMetadata()
        entry = _record(record, "TensorStorageMetadata")
        dtype = _record(entry.field("properties"), "TensorProperties").state[0]
        if not isinstance(dtype, torch.dtype):
            _refuse(f"{name} has no number format")
        chunks = []
        for chunk in entry.field("chunks"):
            parts = _record(chunk, "ChunkStorageMetadata")
            sizes, offsets = _size(parts.field("sizes")), _size(parts.field("offsets"))
            chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        return TensorStorageMetadata(TensorProperties(dtype), _size(entry.field("size")), chunks)

    def _index(self, record: Any) -> MetadataIndex:
        index = _record(record, "MetadataIndex")
        offset, hint = index.field("offset"), index.field("index")
        if hint is not None and not isinstance(hint, int):
            _refuse("an item has no number")
        return MetadataIndex(
            _text(index.field("fqn")), None if offset is None else _size(offset), hint
        )

    def _info(self, name: str, record: Any) -> Any:
        info = _record(record, "_StorageInfo")
        file, offset, length = (
            _text(info.field("relative_path")),
            info.field("offset"),
            info.field("length"),
        )
        if Path(file).name != file or file.startswith(".."):
            _refuse(f"{name} lies in {file!r}, which is no file of this folder")
        if info.field("transform_descriptors"):
            _refuse(f"{name} is transformed in a way that is not known here")
        _size((offset, length))
        if file not in self.sizes:
            path = self.folder / file
            if not path.is_file():
                raise UnreadableError(
                    f"{path} is missing; {self.folder / INDEX} names it for {name}"
                )
            self.sizes[file] = path.stat().st_size
        if offset + length > self.sizes[file]:
            raise UnreadableError(
                f"{self.folder / file} is cut short: {name} ends at byte {offset + length} of "
                f"{self.sizes[file]}"
            )
        return filesystem._StorageInfo(file, offset, length)

    def _require_whole(self, name: str, entry: TensorStorageMetadata, places: Any) -> None:
        """Every element has one chunk, and every chunk an item."""
        elements = 0
        for chunk in entry.chunks:
            if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
                _refuse(f"a chunk of {name} has another number of axes")
            ends = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            if any(offset + size > whole for offset, size, whole in ends):
                _refuse(f"a chunk of {name} reaches beyond its shape {tuple(entry.size)}")
            if MetadataIndex(name, chunk.offsets) not in places:
                _refuse(f"the part of {name} at {tuple(chunk.offsets)} is missing")
            elements += math.prod(chunk.sizes)
        if elements != math.prod(entry.size):
            _refuse(f"{name} has {elements} of {math.prod(entry.size)} elements")
        if pair := _overlap([chunk for chunk in entry.chunks if math.prod(chunk.sizes)]):
            one, other = (tuple(chunk.offsets) for chunk in pair)
            _refuse(f"the parts of {name} at {one} and {other} overlap, so others are missing")


def _overlap(chunks: list[ChunkStorageMetadata]) -> _Pair | None:
    """Find two chunks that share an element.

    Chunks of any grid fall apart along one axis after the other, in the time of a few sorts. What
    does not fall apart is compared in pairs.
    """
    groups = [chunks]
    while groups:
        group = groups.pop()
        if len(group) < 2:  # noqa: PLR2004  nothing to compare with
            continue
        for axis in range(len(group[0].sizes)):
            parts = _apart(group, axis)
            if len(parts) > 1:
                groups += parts
                break
        else:
            if pair := _meeting(group):
                return pair
    return None


def _apart(chunks: list[ChunkStorageMetadata], axis: int) -> list[list[ChunkStorageMetadata]]:
    """Split chunks where none of them lies on both sides of a cut through an axis."""
    parts: list[list[ChunkStorageMetadata]] = []
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
        if not parts or chunk.offsets[axis] >= end:
            parts.append([])
        parts[-1].append(chunk)
        end = max(end, chunk.offsets[axis] + chunk.sizes[axis])
    return parts


def _meeting(chunks: list[ChunkStorageMetadata]) -> _Pair | None:
    """Compare each chunk with those behind it."""
    starts = torch.tensor([list(chunk.offsets) for chunk in chunks])
    ends = starts + torch.tensor([list(chunk.sizes) for chunk in chunks])
    for number in range(len(chunks) - 1):
        behind = slice(number + 1, None)
        meet = ((starts[behind] < ends[number]) & (ends[behind] > starts[number])).all(dim=1)
        if meet.any():
            return chunks[number], chunks[number + 1 + int(meet.nonzero()[0])]
    return None


def _require_plain_common(folder: Path, metadata: Metadata) -> None:
    """Refuse a common state of anything but plain data; Megatron would unpickle it."""
    info = (metadata.storage_data or {}).get(MetadataIndex(COMMON))
    if info is None:
        return
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        content = io.BytesIO(file.read(info.length))
    try:
        torch.load(content, weights_only=True)
    except Exception as error:
        raise UnreadableError(
            f"{folder / info.relative_path}: the common state is damaged or asks for code, which "
            f"is not run: {str(error).partition('.')[0]}"
        ) from error


def _record(value: Any, name: str) -> _Record:
    if not isinstance(value, _RECORDS[name]):
        _refuse(f"there should be a {name}, and is {type(value).__name__}")
    assert isinstance(value, _Record)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        _refuse(f"{value!r} is no name")
    return str(value)


def _size(value: Any) -> torch.Size:
    if not all(type(one) is int and one >= 0 for one in value):
        _refuse(f"{value!r} is no size")
    return torch.Size(value)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def _read_metadata(reader: Any, *_: Any, **__: Any) -> Metadata:
    """Stand for FileSystemReader.read_metadata (torch 2.11, filesystem.py 917: pickle.load)."""
    metadata = read(Path(reader.path))
    assert metadata.storage_meta is not None
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def _load_bytes(planner: Any, item: Any, value: io.BytesIO) -> None:
    """Stand for DefaultLoadPlanner.load_bytes (torch 2.11, default_planner.py 371), a pickle too.

    Through it Megatron loads its common state (core 0.19.2, serialization.py 229).
    """
    try:
        loaded = torch.load(value, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnreadableError(
            f"{item.dest_index.fqn} holds more than tensors and plain data"
        ) from error
    if planner.flatten_state_dict:
        path = planner.mappings[item.dest_index.fqn]
        default_planner.set_element(planner.original_state_dict, path, loaded)
    else:
        planner.state_dict[item.dest_index.fqn] = loaded


def install() -> None:
    """Let every reader of this process, Megatron's too, read checkpoints in this way."""
    written_for.SAFE_INDEX.put(FileSystemReader__read_metadata=_read_metadata)
    written_for.SAFE_BYTES.put(DefaultLoadPlanner__load_bytes=_load_bytes)
