"""Broken token files are named before anything starts."""

import struct
from pathlib import Path

import numpy as np
import pytest

from hybrid_train.data.token_files import spaced_parts, verify
from hybrid_train.schema.problems import UserError
from tests.unit.data.corpus import VOCAB, write_corpus


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    write_corpus(tmp_path / "a", [5, 7, 11])
    return str(tmp_path / "a")


def test_whole_files_pass_and_are_described(prefix: str) -> None:
    found = verify(prefix, VOCAB)
    assert (found.documents, found.tokens, found.dtype) == (3, 23, np.dtype(np.uint16))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix: str, suffix: str) -> None:
    Path(prefix + suffix).unlink()
    with pytest.raises(UserError, match=rf"a{suffix} does not exist; check the prefixes"):
        verify(prefix)


def test_a_prefix_written_with_its_suffix_is_explained(prefix: str) -> None:
    with pytest.raises(UserError, match=r"without \.bin or \.idx"):
        verify(f"{prefix}.bin")


@pytest.mark.parametrize("kept", [0, 20, 34, 60, -1])
def test_a_truncated_index_is_named_wherever_it_ends(prefix: str, kept: int) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"a\.idx is truncated"):
        verify(prefix)


def test_a_file_of_another_kind_is_no_index(prefix: str) -> None:
    Path(f"{prefix}.idx").write_bytes(b"text of another kind " * 10)
    with pytest.raises(UserError, match=r"a\.idx is no index of token files"):
        verify(prefix)


def test_an_index_that_contradicts_itself_is_named(prefix: str) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:-8] + struct.pack("<q", 2))
    with pytest.raises(UserError, match=r"documents end at sequence 2 of 3"):
        verify(prefix)


def test_a_short_bin_file_is_named_with_both_sizes(prefix: str) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"a\.bin is truncated: it has 44 bytes, .* describes 46"):
        verify(prefix)


def test_a_long_bin_file_does_not_belong_to_its_index(prefix: str) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(UserError, match="does not belong to its index"):
        verify(prefix)


def test_tokens_of_another_tokenizer_are_noticed(prefix: str) -> None:
    with pytest.raises(UserError, match=r"vocabulary ends at 9; .* set data\.tokenizer"):
        verify(prefix, vocab_size=10)


def test_spread_covers_a_short_file_whole(prefix: str) -> None:
    assert sum(len(part) for part in spaced_parts(verify(prefix), at_most=1000)) == 23


@pytest.mark.parametrize("at_most", [1, 10, 22])
def test_spread_reaches_both_ends_of_a_long_file(prefix: str, at_most: int) -> None:
    whole = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    parts = list(spaced_parts(verify(prefix), at_most=at_most, pieces=2))
    assert parts[0][0] == whole[0]
    assert parts[-1][-1] == whole[-1]
    assert len(parts) == 2
