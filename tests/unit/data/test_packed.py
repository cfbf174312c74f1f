"""Packed rows: every document once an epoch, whole where it fits, nothing lost between phases."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_train.data.documents import Span
from hybrid_train.data.index_cache import IndexCache
from hybrid_train.data.packing import PackedPosition, PackedRows, Packing
from hybrid_train.schema.problems import UserError
from tests.unit.data.documents import listed, random_lengths

NOWHERE = IndexCache(None)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60).filter(lambda found: max(found) > 1)


def packed(
    lengths: list[int], length: int = 16, longest: int = 16, begin: PackedPosition | None = None
) -> PackedRows:
    documents = listed(*lengths)
    packing = Packing(length, longest, padding=0)
    return PackedRows(
        documents, packing, key=(1, "a"), cache=NOWHERE, begin=begin or PackedPosition()
    )


def spans(rows: PackedRows, first: int, last: int) -> list[Span]:
    return [span for row in range(first, last) for span in rows.spans(row)]


def labels(found: list[Span]) -> Counter[tuple[int, int]]:
    """Each token that is a label, as document and place."""
    return Counter((one.document, t) for one in found for t in range(one.start + 1, one.stop))


def all_labels(lengths: list[int]) -> Counter[tuple[int, int]]:
    return Counter((number, t) for number, size in enumerate(lengths) for t in range(1, size))


@given(LENGTHS)
def test_every_label_comes_once_an_epoch(lengths: list[int]) -> None:
    rows = packed(lengths)
    assert labels(spans(rows, 0, rows.first_epoch())) == all_labels(lengths)


@given(LENGTHS)
def test_documents_that_fit_are_whole_and_rows_are_not_overfull(lengths: list[int]) -> None:
    rows = packed(lengths)
    for row in range(rows.first_epoch()):
        found = rows.spans(row)
        assert sum(one.stop - one.start - 1 for one in found) <= 16
        for one in found:
            if lengths[one.document] <= 17:
                assert (one.start, one.stop) == (0, lengths[one.document])


def test_a_row_holds_the_tokens_of_its_pieces() -> None:
    rows = packed(random_lengths(60, 20))
    for row in range(10):
        fields, found = rows.fill(row), rows.spans(row)
        expected = [
            1000 * one.document + t for one in found for t in range(one.start, one.stop - 1)
        ]
        assert fields["tokens"][: len(expected)].tolist() == expected
        assert fields["loss_weights"].sum() == len(expected)
        counted = fields["sequence_index"][: len(expected)]
        assert Counter(counted.tolist()) == Counter(
            {number: one.stop - one.start - 1 for number, one in enumerate(found)}
        )


def test_long_documents_can_be_cut_shorter_than_a_row() -> None:
    rows = packed([200], length=64, longest=8)
    found = spans(rows, 0, rows.first_epoch())
    assert max(one.stop - one.start - 1 for one in found) == 8
    assert labels(found) == all_labels([200])


@pytest.mark.slow
@settings(deadline=None)
@given(LENGTHS, st.integers(0, 80), st.integers(0, 80), st.sampled_from([4, 16, 24]))
def test_a_phase_with_other_rows_goes_on_without_loss(
    lengths: list[int], first_rows: int, second_rows: int, second_length: int
) -> None:
    first = packed(lengths)
    second = packed(lengths, second_length, second_length, begin=first.end(first_rows))
    read = labels(spans(first, 0, first_rows)) + labels(spans(second, 0, second_rows))
    end = second.end(second_rows)
    rest = labels(list(end.left_over))
    # What was read and what is left of the window are whole windows of whole epochs.
    windows = end.epoch + (end.window > 0)
    whole = all_labels(lengths)
    assert end.window == 0 or len(lengths) > 4096
    assert read + rest == Counter({label: count * windows for label, count in whole.items()})


def test_windows_of_a_large_source_follow_each_other() -> None:
    lengths = random_lengths(10_000, 20)
    rows = packed(lengths)
    assert labels(spans(rows, 0, rows.first_epoch())) == all_labels(lengths)
    middle = rows.end(300)
    later = packed(lengths, begin=middle)
    assert middle.window == 1
    found = labels(spans(rows, 0, 300)) + labels(spans(later, 0, later.first_epoch()))
    assert found == all_labels(lengths)


def test_rows_are_full_where_there_are_short_documents() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 4096).astype(int).clip(2, 100_000)
    rows = packed(lengths.tolist(), 4096, 4096)
    taken = [sum(one.stop - one.start - 1 for one in rows.spans(row)) for row in range(200)]
    assert np.mean(taken) > 0.99 * 4096


def test_documents_without_anything_to_predict_are_refused() -> None:
    with pytest.raises(UserError, match="no document of two tokens"):
        packed([1, 1, 1]).spans(0)
