"""Token files through megatron.core.datasets: what is written is what sequences are cut from."""

import errno
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_train.config.problems import UserError
from hybrid_train.data.megatron import Documents, TokenSequences, write_documents
from tests.unit.data.corpus import END, VOCAB, write_corpus

LENGTH = 8


def sequences(*prefixes: Path, seed: int = 1, count: int = 1, **changes: object) -> TokenSequences:
    found = TokenSequences(
        [str(prefix) for prefix in prefixes],
        sequence_length=LENGTH,
        seed=seed,
        end_of_document=END,
        **changes,
    )
    found.prepare(count)
    return found


def rows(found: TokenSequences) -> list[list[int]]:
    return [found[i]["tokens"].tolist() for i in range(len(found))]


def test_documents_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = write_corpus(tmp_path / "a", [5, 1, 30])
    found = Documents(tmp_path / "a")
    assert [found[i].tolist() for i in range(len(found))] == written
    assert found.lengths.tolist() == [5, 1, 30]


@pytest.mark.parametrize(("vocab_size", "num_bytes"), [(300, 2), (131_072, 4)])
def test_tokens_take_as_many_bytes_as_the_vocabulary_needs(
    tmp_path: Path, vocab_size: int, num_bytes: int
) -> None:
    write_documents(tmp_path / "a", [[1, 2, vocab_size - 1]], vocab_size=vocab_size)
    assert (tmp_path / "a.bin").stat().st_size == 3 * num_bytes
    assert Documents(tmp_path / "a")[0].tolist() == [1, 2, vocab_size - 1]


def test_labels_are_tokens_shifted_by_one(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [30, 40, 50])
    found = sequences(tmp_path / "a")
    for i in range(len(found)):
        assert torch.equal(found[i]["labels"][:-1], found[i]["tokens"][1:])
        assert torch.equal(found[i]["position_ids"], torch.arange(LENGTH))
        assert torch.equal(found[i]["loss_mask"], torch.ones(LENGTH))


def test_an_epoch_uses_every_token_once_but_for_the_last_part(tmp_path: Path) -> None:
    # One long document of distinct tokens: 8 sequences of 8, one last label, a part left over.
    write_documents(tmp_path / "a", [list(range(1, 70))], vocab_size=VOCAB)
    found = sequences(tmp_path / "a")
    assert sorted(np.concatenate(rows(found)).tolist()) == list(range(1, 65))


def test_epochs_differ_in_order_and_not_in_content(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [list(range(1, 70))], vocab_size=VOCAB)
    found = rows(sequences(tmp_path / "a", count=24))
    epochs = [found[0:8], found[8:16], found[16:24]]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert all(first != second for first, second in pairwise(epochs))


def test_a_longer_run_starts_with_the_order_of_a_shorter_one(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [30, 40, 50])
    short, long = sequences(tmp_path / "a", count=1), sequences(tmp_path / "a", count=100)
    assert len(long) >= 100
    assert rows(long)[: len(short)] == rows(short)


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [300])
    assert rows(sequences(tmp_path / "a", seed=1)) != rows(sequences(tmp_path / "a", seed=2))


def test_several_prefixes_count_by_their_sizes(tmp_path: Path) -> None:
    write_documents(tmp_path / "ones", [[1] * 81], vocab_size=VOCAB)
    write_documents(tmp_path / "twos", [[2] * 241], vocab_size=VOCAB)
    found = [row[0] for row in rows(sequences(tmp_path / "ones", tmp_path / "twos"))]
    assert (found.count(1), found.count(2)) == (10, 30)


def test_new_files_under_an_old_name_do_not_meet_the_old_order(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [300])
    sequences(tmp_path / "a")
    write_documents(tmp_path / "a", [list(range(1, 42))], vocab_size=VOCAB)
    assert len(sequences(tmp_path / "a")) == 5


def test_the_order_goes_to_the_cache_folder_if_one_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus" / "a", [300])
    sequences(tmp_path / "corpus" / "a", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir())
    assert {path.suffix for path in (tmp_path / "corpus").iterdir()} == {".bin", ".idx"}


def test_an_order_that_was_half_written_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "a", [300])
    expected = rows(sequences(tmp_path / "a", cache=tmp_path / "whole"))
    saved: list[str] = []

    def break_at_third(path: str, *_args: object, **_options: object) -> None:
        Path(path).write_bytes(b"half")
        saved.append(path)
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", break_at_third)
        with pytest.raises(UserError, match="No space left on device"):
            sequences(tmp_path / "a", cache=tmp_path / "cache")
    assert [*(tmp_path / "cache").glob("*/*")] == []
    assert rows(sequences(tmp_path / "a", cache=tmp_path / "cache")) == expected


def test_a_process_that_cannot_reach_the_cache_says_so(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [300])
    found = TokenSequences(
        [str(tmp_path / "a")], sequence_length=LENGTH, seed=1, end_of_document=END
    )
    with pytest.raises(UserError, match="that all processes can reach"):
        found.prepare(1, is_main=False)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [300])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/cache.*set data\.cache"):
        sequences(tmp_path / "a", cache=tmp_path / "file" / "cache")


def test_a_prefix_shorter_than_one_sequence_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [LENGTH])  # one token short: the last label is missing
    with pytest.raises(UserError, match=r"a\.bin holds 8 tokens, too few"):
        sequences(tmp_path / "a")


def test_sequences_beyond_the_prepared_ones_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [300])
    found = sequences(tmp_path / "a")
    with pytest.raises(IndexError):
        found[len(found)]
