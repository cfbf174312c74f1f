"""Token files through megatron.core.datasets: they are read as they were written."""

from pathlib import Path

import pytest

from hybrid_train.data.megatron import Documents, write_documents
from tests.unit.data.corpus import write_corpus


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
