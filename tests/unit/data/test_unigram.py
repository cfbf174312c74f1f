"""The unigram loss against what one computes by hand."""

from math import log
from pathlib import Path

import pytest

from hybrid_train.data.run_data import unigram_cross_entropy
from hybrid_train.data.token_files import write_documents


def test_unigram_loss_equals_the_count_by_hand(tmp_path: Path) -> None:
    train, validation = str(tmp_path / "train"), str(tmp_path / "validation")
    write_documents(train, [[0, 0, 1], [0]], vocab_size=3)
    write_documents(validation, [[0, 1, 2]], vocab_size=3)
    # Add-one smoothing over three tokens: p = 4/7, 2/7, 1/7.
    expected = -(log(4 / 7) + log(2 / 7) + log(1 / 7)) / 3
    assert unigram_cross_entropy([train], [validation], 3) == pytest.approx(expected)


def test_unigram_counts_add_up_over_files(tmp_path: Path) -> None:
    for name, tokens in {"whole": [0, 1, 1, 2], "first": [0, 1], "second": [1, 2]}.items():
        write_documents(tmp_path / name, [tokens], vocab_size=3)
    whole, first, second = (str(tmp_path / name) for name in ("whole", "first", "second"))
    split = unigram_cross_entropy([first, second], [second, first], 3)
    assert split == pytest.approx(unigram_cross_entropy([whole], [whole], 3))
