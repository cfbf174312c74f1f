"""Documents of token files are those that Megatron's writer was given."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from hybrid_train.data.documents import FileDocuments
from hybrid_train.schema.data import Remote
from hybrid_train.schema.problems import UserError
from tests.unit.data.corpus import VOCAB, write_corpus

LENGTHS = [5, 1, 7, 300, 2]
TYPES = [np.uint8, np.int16, np.int32, np.int64, np.uint16]
FIRST_BOUNDARY = -8 * (len(LENGTHS) + 1)  # from the end of the .idx


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    write_corpus(tmp_path / "a", LENGTHS)
    return str(tmp_path / "a")


def write_grouped(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> str:
    """Write documents, each a list of sequences, with Megatron's own writer."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        tokens = np.array([token for sequence in sequences for token in sequence])
        builder.add_document(tokens, [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_part_of_every_document_is_read_in_every_token_type(
    tmp_path: Path, dtype: type
) -> None:
    largest = np.iinfo(dtype).max
    written = [[1, largest, 0], [0], [largest - 1, 2, 3, 0]]
    documents = FileDocuments(write_grouped(tmp_path / "a", [[d] for d in written], dtype))
    assert documents.lengths.tolist() == [3, 1, 4]
    for number, tokens in enumerate(written):
        for start in range(len(tokens) + 1):
            for stop in range(start, len(tokens) + 1):
                found = documents.read(number, start, stop)
                assert found.dtype == np.int64
                assert found.tolist() == tokens[start:stop]


def test_sequences_that_form_one_document_are_read_as_one(tmp_path: Path) -> None:
    written = [[[1, 2], [3], [4, 5, 0]], [[6, 0]], [[7], [8, 0]]]
    documents = FileDocuments(write_grouped(tmp_path / "a", written))
    assert documents.lengths.tolist() == [6, 2, 3]
    assert documents.lengths.dtype == np.int32
    assert documents.read(0, 0, 6).tolist() == [1, 2, 3, 4, 5, 0]
    assert documents.read(0, 1, 4).tolist() == [2, 3, 4]
    assert documents.read(2, 0, 3).tolist() == [7, 8, 0]


def test_as_many_documents_as_sequences_need_not_be_one_each(tmp_path: Path) -> None:
    # An empty document beside one of two sequences: the number of boundaries alone would not tell.
    documents = FileDocuments(write_grouped(tmp_path / "a", [[[1, 0], [2, 0]], [], [[3, 0]]]))
    assert documents.lengths.tolist() == [4, 0, 2]
    assert documents.read(0, 0, 4).tolist() == [1, 0, 2, 0]
    assert documents.read(1, 0, 0).tolist() == []
    assert documents.read(2, 0, 2).tolist() == [3, 0]


def test_lengths_of_plain_files_are_a_view_of_the_index(prefix: str) -> None:
    lengths = FileDocuments(prefix).lengths
    assert lengths.tolist() == LENGTHS
    assert not lengths.flags.owndata
    assert not lengths.flags.writeable


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (3, 2)])
def test_tokens_that_a_document_has_not_are_refused(prefix: str, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=f"tokens {start} to {stop} of a document of 5"):
        FileDocuments(prefix).read(0, start, stop)


@pytest.mark.parametrize("number", [-1, len(LENGTHS)])
def test_a_document_that_is_not_there_is_refused(prefix: str, number: int) -> None:
    with pytest.raises(IndexError, match=f"document {number} of 5"):
        FileDocuments(prefix).read(number, 0, 1)


@pytest.mark.parametrize("offset", [10**6, 2 * sum(LENGTHS) - 5, -100])
def test_an_index_that_points_outside_the_tokens_is_named(
    prefix: str, tmp_path: Path, offset: int
) -> None:
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    place = 34 + 4 * len(LENGTHS)  # of the offset of document 0
    data[place : place + 8] = np.int64(offset).tobytes()
    Path(f"{prefix}.idx").write_bytes(data)
    remote = Remote(cache=str(tmp_path / "cache"), block_bytes=4096)
    for name in (prefix, f"file://{prefix}"):  # the second goes through blocks
        documents = FileDocuments(name, remote=remote)
        with pytest.raises(UserError, match=rf"{name}\.idx places document 0 outside .*a\.bin"):
            documents.read(0, 0, 5)
        assert documents.read(3, 299, 300).tolist() == [0]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_document_without_tokens_is_read_even_at_the_end(tmp_path: Path, scheme: str) -> None:
    written = [[[1] * 2047 + [0]], []]  # 4096 bytes: the end is that of a block
    name = scheme + write_grouped(tmp_path / "a", written)
    remote = Remote(cache=str(tmp_path / "cache"), block_bytes=4096)
    documents = FileDocuments(name, remote=remote)
    assert documents.lengths.tolist() == [2048, 0]
    assert documents.read(1, 0, 0).tolist() == []


def test_documents_that_overlap_are_named(prefix: str) -> None:
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    data[FIRST_BOUNDARY + 8 : FIRST_BOUNDARY + 16] = np.int64(4).tobytes()
    Path(f"{prefix}.idx").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.idx contradicts itself: its documents overlap"):
        FileDocuments(prefix)


def test_faults_of_the_files_are_those_that_verify_names(prefix: str) -> None:
    with pytest.raises(UserError, match="vocabulary ends at 9"):
        FileDocuments(prefix, vocab_size=10)
    Path(f"{prefix}.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.bin is truncated"):
        FileDocuments(prefix)


def test_a_pickled_copy_opens_the_files_again(prefix: str) -> None:
    original = FileDocuments(prefix, VOCAB)
    pickled = pickle.dumps(original)
    assert len(pickled) < 1000  # no tokens in it
    copy = pickle.loads(pickled)
    assert copy.read(3, 10, 20).tolist() == original.read(3, 10, 20).tolist()


def test_the_fingerprint_is_of_the_content_and_not_of_name_or_time(tmp_path: Path) -> None:
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        write_corpus(tmp_path / name, LENGTHS, seed=seed)
    write_corpus(tmp_path / "d", LENGTHS[::-1], seed=0)
    a, b, c, d = (FileDocuments(str(tmp_path / name)).fingerprint() for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


@pytest.mark.parametrize("place", [0, -2])
def test_the_fingerprint_of_long_files_sees_both_ends(tmp_path: Path, place: int) -> None:
    write_corpus(tmp_path / "a", [50_000])
    before = FileDocuments(str(tmp_path / "a")).fingerprint()
    data = bytearray((tmp_path / "a.bin").read_bytes())
    data[place] ^= 1
    (tmp_path / "a.bin").write_bytes(data)
    assert FileDocuments(str(tmp_path / "a")).fingerprint() != before


def test_an_index_with_a_negative_length_is_named(prefix: str) -> None:
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    data[34:38] = np.int32(-5).tobytes()  # of sequence 0, behind the header
    Path(f"{prefix}.idx").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.idx contradicts itself: it has a sequence of -5"):
        FileDocuments(prefix)
