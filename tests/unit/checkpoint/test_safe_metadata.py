"""The index of a checkpoint: equal to torch's own reading, and closed to everything else."""

import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from hybrid_train.checkpoint import safe_metadata, tensor_files
from hybrid_train.checkpoint.tensor_files import CheckpointWriter, StoredTensors
from hybrid_train.schema.problems import UserError

ROWS = torch.arange(24.0).view(6, 4)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of one tensor in two chunks."""
    writer = CheckpointWriter(tmp_path)
    writer.place("a", (6, 4), 0, (4, 4), ROWS.dtype).write(ROWS[:4])
    writer.place("a", (6, 4), 4, (2, 4), ROWS.dtype).write(ROWS[4:])
    writer.finish()
    return tmp_path


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def unpickled(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def rewrite(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_an_index_is_read_as_torch_reads_it(checkpoint: Path) -> None:
    expected, found = unpickled(checkpoint), safe_metadata.read(checkpoint)
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data


def test_an_index_in_which_megatron_keeps_its_plans_is_read(checkpoint: Path) -> None:
    metadata = unpickled(checkpoint)
    entry = metadata.state_dict_metadata["a"]
    item = WriteItem(
        MetadataIndex("a", torch.Size((0, 0))), WriteItemType.SHARD,
        tensor_data=TensorWriteData(entry.chunks[0], entry.properties, entry.size),
    )  # fmt: skip
    vars(metadata)["all_local_plans"] = [SavePlan([item])]
    rewrite(checkpoint, metadata)
    found = safe_metadata.read(checkpoint)
    assert found.state_dict_metadata == metadata.state_dict_metadata


def test_what_a_foreign_checkpoint_keeps_beside_tensors_is_left_to_others(checkpoint: Path) -> None:
    (checkpoint / "common.pt").write_bytes(b"any pickle")
    with pytest.raises(UserError, match="pickle of an older Megatron"):
        safe_metadata.read(checkpoint)
    assert "a" in safe_metadata.read(checkpoint, foreign=True).state_dict_metadata


def test_an_index_that_asks_for_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    metadata = unpickled(checkpoint)
    metadata.planner_data = Evil(tmp_path / "made")
    rewrite(checkpoint, metadata)
    with pytest.raises(UserError, match=r"asks for posix\.mkdir"):
        safe_metadata.read(checkpoint)
    assert not (tmp_path / "made").exists()


def test_torchs_own_reader_refuses_it_too_once_installed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileSystemReader, "read_metadata", FileSystemReader.read_metadata)
    safe_metadata.install()
    rewrite(checkpoint, Evil(tmp_path / "made"))
    with pytest.raises(UserError, match=r"asks for posix\.mkdir"):
        FileSystemReader(checkpoint).read_metadata()
    assert not (tmp_path / "made").exists()


def test_a_common_state_with_code_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tensor_files, "torch_saved", lambda _: pickled(Evil(tmp_path / "made")))
    writer = CheckpointWriter(tmp_path)
    writer.finish()
    with pytest.raises(UserError, match="common state is damaged or asks for code"):
        safe_metadata.read(tmp_path)
    assert not (tmp_path / "made").exists()


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_an_old_common_state_is_refused(checkpoint: Path) -> None:
    (checkpoint / "common.pt").write_bytes(b"")
    with pytest.raises(UserError, match="pickles are not read"):
        safe_metadata.read(checkpoint)


def _outside(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../other.distcp"


def _too_long(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.length += 10**6


def _too_few(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"].chunks.pop()


def _beyond(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size((7, 4))


def _overlapping(metadata: Metadata) -> None:
    # Twenty-four elements, but the first two rows twice and the last two never.
    chunks = metadata.state_dict_metadata["a"].chunks
    (second,) = [one for one in chunks if one.offsets[0] == 4]
    second.offsets = torch.Size((2, 0))
    metadata.storage_data[MetadataIndex("a", torch.Size((2, 0)))] = next(
        iter(metadata.storage_data.values())
    )


def _no_item(metadata: Metadata) -> None:
    metadata.storage_data = dict(list(metadata.storage_data.items())[1:])


def _missing_file(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "__7_7.distcp"


def _no_shape(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"].size = "large"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_outside, "which is no file of this folder"),
        (_too_long, "is cut short"),
        (_too_few, "a has 16 of 24 elements"),
        (_beyond, "a chunk of a reaches beyond its shape"),
        (_overlapping, r"parts of a at \(0, 0\) and \(2, 0\) overlap, so others are missing"),
        (_no_item, "the part of a at"),
        (_missing_file, "__7_7.distcp is missing"),
        (_no_shape, "damaged or not to be trusted"),
    ],
)
def test_an_index_that_does_not_add_up_is_refused(
    checkpoint: Path, change: Any, message: str
) -> None:
    metadata = unpickled(checkpoint)
    change(metadata)
    rewrite(checkpoint, metadata)
    with pytest.raises(UserError, match=message):
        safe_metadata.read(checkpoint)


def boxes(*sides: tuple[int, int, int, int]) -> list[ChunkStorageMetadata]:
    """Make chunks of two axes from start and size of each."""
    return [
        ChunkStorageMetadata(torch.Size((row, column)), torch.Size((rows, columns)))
        for row, column, rows, columns in sides
    ]


# Around the square in the middle: no cut through either axis leaves all chunks in one piece.
WINDMILL = boxes((0, 0, 1, 2), (0, 2, 2, 1), (2, 1, 1, 2), (1, 0, 2, 1), (1, 1, 1, 1))


def test_chunks_that_no_cut_separates_are_compared_in_pairs() -> None:
    assert safe_metadata._overlap(WINDMILL) is None
    assert safe_metadata._overlap([*WINDMILL[:4], *boxes((0, 1, 2, 1))]) is not None


@pytest.mark.parametrize("seed", range(20))
def test_an_overlap_is_found_as_painting_finds_it(seed: int) -> None:
    draw = random.Random(seed)
    chunks = boxes(
        *(
            (draw.randrange(12), draw.randrange(12), draw.randint(1, 3), draw.randint(1, 3))
            for _ in range(draw.randint(2, 9))
        )
    )
    painted = torch.zeros(16, 16, dtype=torch.int)
    for chunk in chunks:
        (row, column), (rows, columns) = chunk.offsets, chunk.sizes
        painted[row : row + rows, column : column + columns] += 1
    assert (safe_metadata._overlap(chunks) is not None) == bool((painted > 1).any())


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"garbage", pickle.dumps({"a": 1})])
def test_what_is_no_index_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="damaged or not to be trusted"):
        safe_metadata.read(checkpoint)


def test_every_flipped_byte_is_refused_or_harmless(checkpoint: Path) -> None:
    """None runs code or raises anything but a UserError."""
    original = (checkpoint / ".metadata").read_bytes()
    for place in range(len(original)):
        flipped = bytearray(original)
        flipped[place] ^= 0x55
        (checkpoint / ".metadata").write_bytes(flipped)
        try:
            with StoredTensors(checkpoint) as stored:
                for name in stored.names:
                    stored.read(name, 0, stored.shape(name)[0])
        except UserError:
            pass
