"""Parts of tensors in a checkpoint: as torch writes and reads them, whatever the chunks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from hybrid_train.checkpoint import tensor_files
from hybrid_train.checkpoint.tensor_files import CheckpointWriter, StoredTensors, bytes_of
from hybrid_train.schema.problems import UserError
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def add(writer: CheckpointWriter, name: str, values: Tensor, start: int, stop: int) -> None:
    """Write rows [start, stop) of a tensor."""
    rows = values[start:stop]
    writer.place(name, tuple(values.shape), start, tuple(rows.shape), rows.dtype).write(rows)


def read_from(content: bytes) -> tensor_files.ReadAt:
    """Read the bytes as if they were those of a file."""
    return lambda number, position: content[position : position + number]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (6, 4), (5, 2, 3), (4, 1, 4)], ids=str)
def test_torch_reads_what_is_written_and_any_rows_come_back(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    values, cut = some(*shape, dtype=dtype), shape[0] // 2
    writer = CheckpointWriter(tmp_path)
    for start, stop in ((0, cut), (cut, shape[0])):
        if start < stop:
            add(writer, "a", values, start, stop)
    writer.finish()
    loaded = {"a": torch.zeros(shape, dtype=dtype)}
    load(loaded, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(loaded["a"], values)
    with StoredTensors(tmp_path) as stored:
        assert stored.dtype("a") == dtype
        for start in range(shape[0]):
            for stop in range(start + 1, shape[0] + 1):
                assert torch.equal(stored.read("a", start, stop), values[start:stop])


@pytest.mark.parametrize("checksums", [True, False], ids=["checksums", "no checksums"])
@pytest.mark.parametrize("known", [True, False], ids=["compared", "parsed"])
def test_an_item_that_torch_wrote_is_found(
    checksums: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:  # as if it were too large for an item of zeros to compare with
        monkeypatch.setattr(tensor_files, "_LARGEST_COMPARED", 0)
    values = some(5, 3)
    content = b"before" + tensor_files.torch_saved(values, checksums=checksums)
    part = tensor_files.StoredItem(6, len(content) - 6, values.dtype, (5, 3))
    start = tensor_files.start_of_values(read_from(content), part)
    found = torch.frombuffer(bytearray(content[start : start + 60]), dtype=torch.float32)
    assert torch.equal(found.view(5, 3), values)


@pytest.mark.parametrize(
    "content",
    [
        some(3, 5).t(),  # the same bytes, to be read in another order
        some(5, 4)[:, :3],
        some(5, 3).half(),
        {"a": some(5, 3)},
        torch.nn.Parameter(some(5, 3)),
        [1, 2, 3],
    ],
    ids=["transposed", "narrowed", "half", "in a dictionary", "parameter", "list"],
)
def test_an_item_of_anything_else_is_refused(content: object) -> None:
    written = tensor_files.torch_saved(content)
    with pytest.raises(ValueError, match=r"it is|it has"):
        tensor_files.start_of_values(
            read_from(written), tensor_files.StoredItem(0, len(written), torch.float32, (5, 3))
        )


def test_an_item_is_written_as_torch_does() -> None:
    values = some(9, 4, dtype=torch.bfloat16)
    before, behind = tensor_files.bytes_around(values.dtype, (9, 4), checksums=False)
    written = before + bytes(bytes_of(values)) + behind
    assert written == tensor_files.torch_saved(values, checksums=False)


def test_large_checkpoints_have_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 1000)
    writer = CheckpointWriter(tmp_path)
    for number in range(4):
        add(writer, f"a{number}", some(9, 4) + number, 0, 9)
    writer.finish()
    assert len(list(tmp_path.glob("*.distcp"))) > 1
    with StoredTensors(tmp_path) as stored:
        for number in range(4):
            assert torch.equal(stored.read(f"a{number}", 0, 9), some(9, 4) + number)


def test_a_damaged_item_is_named(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    add(writer, "a", some(9, 4), 0, 9)
    writer.finish()
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(b"X" * 300 + file.read_bytes()[300:])
    with StoredTensors(tmp_path) as stored, pytest.raises(UserError, match=r"__0_0\.distcp: a is"):
        stored.read("a", 0, 9)
