"""Token files are those of Megatron, both ways, to the byte."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from hybrid_train.data import token_files
from hybrid_train.data.token_files import TokenReader, dtype_for, write_index

pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")

TYPES = [np.dtype("<u2"), np.dtype("<i4")]


def documents(dtype: np.dtype, count: int = 50) -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    high = 65_499 if dtype.itemsize == 2 else 131_071
    lengths = [1, 1, *draw.integers(1, 400, count - 2)]
    return [draw.integers(0, high, length).astype(dtype) for length in lengths]


def write_ours(prefix: Path, written: list[np.ndarray]) -> None:
    Path(f"{prefix}.bin").write_bytes(b"".join(one.tobytes() for one in written))
    lengths = np.array([len(one) for one in written], np.int32)
    write_index(Path(f"{prefix}.idx"), written[0].dtype, lengths)


def write_theirs(prefix: Path, written: list[np.ndarray], per_document: int = 1) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=written[0].dtype.type)
    for start in range(0, len(written), per_document):
        parts = written[start : start + per_document]
        builder.add_document(np.concatenate(parts), [len(part) for part in parts])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("span", [7, 2**20])
def test_megatron_reads_what_we_write(
    tmp_path: Path, dtype: np.dtype, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "_CHUNK", span)
    written = documents(dtype)
    write_ours(tmp_path / "a", written)
    theirs = IndexedDataset(str(tmp_path / "a"))
    assert len(theirs) == len(written)
    for number, expected in enumerate(written):
        assert theirs[number].dtype == dtype
        np.testing.assert_array_equal(theirs[number], expected)
    write_theirs(tmp_path / "b", written)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: np.dtype) -> None:
    written = documents(dtype)
    write_theirs(tmp_path / "a", written)
    reader = TokenReader(tmp_path / "a")
    assert reader.facts.dtype == dtype
    assert len(reader) == len(written)
    for number, expected in enumerate(written):
        np.testing.assert_array_equal(reader[number], expected)
    assert reader.document_lengths().tolist() == [len(one) for one in written]
    assert reader.document_lengths(3, 9).tolist() == [len(one) for one in written[3:9]]


def test_a_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    written = documents(TYPES[0])
    write_theirs(tmp_path / "a", written, per_document=5)
    reader = TokenReader(tmp_path / "a")
    assert len(reader) == 10
    np.testing.assert_array_equal(reader[1], np.concatenate(written[5:10]))
    assert reader.document_lengths()[1] == sum(map(len, written[5:10]))


@pytest.mark.parametrize("size", [300, 65_499, 65_500, 65_536, 131_072])
def test_ids_take_as_many_bytes_as_megatron_gives_them(size: int) -> None:
    assert dtype_for(size) == np.dtype(DType.optimal_dtype(size))
