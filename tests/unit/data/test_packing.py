"""Packing: nothing is lost, nothing overflows, and few rows are used."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hybrid_train.data.packing import best_fit, fill_row

ROW = 60


def lengths(smallest: int = 1, most: int = 60) -> st.SearchStrategy[NDArray[np.int64]]:
    sizes = st.lists(st.integers(smallest, ROW), max_size=most)
    return sizes.map(lambda values: np.array(values, dtype=np.int64))


def loads(spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places taken in each row."""
    return np.bincount(best_fit(spans, ROW), weights=spans).astype(np.int64)


def first_fit(spans: NDArray[np.int64]) -> int:
    """Rows that first-fit decreasing uses."""
    rows: list[int] = []
    for span in sorted(spans.tolist(), reverse=True):
        for number, taken in enumerate(rows):
            if taken + span <= ROW:
                rows[number] += span
                break
        else:
            rows.append(span)
    return len(rows)


def fewest(spans: list[int], room: tuple[int, ...] = ()) -> int:
    """Rows that suffice, found by trying everything."""
    if not spans:
        return len(room)
    span, rest = spans[0], spans[1:]
    counts = [fewest(rest, (*room, ROW - span))]
    for place, left in enumerate(room):
        if span <= left and left not in room[:place]:
            changed = (*room[:place], left - span, *room[place + 1 :])
            counts.append(fewest(rest, changed))
    return min(counts)


@given(lengths())
def test_every_piece_is_in_one_row_and_no_row_is_overfull_or_skipped(
    spans: NDArray[np.int64],
) -> None:
    taken = loads(spans)
    assert taken.sum() == spans.sum()
    assert len(best_fit(spans, ROW)) == len(spans)
    assert all(0 < load <= ROW for load in taken)


@given(lengths())
def test_no_two_rows_could_be_one(spans: NDArray[np.int64]) -> None:
    taken = np.sort(loads(spans))
    assert len(taken) < 2 or taken[0] + taken[1] > ROW


@given(lengths(smallest=ROW // 6))
def test_pieces_of_a_sixth_and_more_take_no_more_rows_than_by_first_fit(
    spans: NDArray[np.int64],
) -> None:
    """Johnson et al. 1974; smaller ones can take one more."""
    assert len(loads(spans)) <= first_fit(spans)


@given(lengths(most=8))
def test_few_pieces_take_at_most_a_row_more_than_they_must(spans: NDArray[np.int64]) -> None:
    assert len(loads(spans)) <= fewest(sorted(spans.tolist(), reverse=True)) + 1


@given(lengths(), st.randoms(use_true_random=False))
def test_the_order_of_pieces_changes_which_but_not_how_full(
    spans: NDArray[np.int64], random: object
) -> None:
    shuffled = spans.tolist()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = loads(np.array(shuffled, dtype=np.int64))
    assert Counter(loads(spans).tolist()) == Counter(other.tolist())


def test_ties_go_to_what_came_first() -> None:
    assert best_fit(np.array([4, 6, 4, 6]), 10).tolist() == [0, 0, 1, 1]
    assert best_fit(np.array([7, 7, 3, 3, 3]), 10).tolist() == [0, 1, 0, 1, 2]


def test_the_fullest_row_with_room_is_taken() -> None:
    # 5 is left beside 5 and 4 beside 6: the last span fits either and goes where less is left.
    assert best_fit(np.array([5, 6, 4]), 10).tolist() == [1, 0, 0]


@pytest.mark.parametrize("wrong", [[0, 3], [11]])
def test_a_piece_that_is_empty_or_too_long_is_refused(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="a row has 1 to 10; cut longer ones"):
        best_fit(np.array(wrong), 10)


def test_no_pieces_need_no_rows() -> None:
    assert best_fit(np.array([], dtype=np.int64), 10).tolist() == []


@pytest.mark.parametrize("median", [100, 400, 1500])
def test_rows_of_realistic_documents_are_full(median: int) -> None:
    """Log-normal lengths, cut at the row, in windows of 4096 spans."""
    row = 4096
    sizes = np.random.default_rng(0).lognormal(np.log(median), 1.2, 4096).astype(int)
    sizes = np.clip(sizes, 1, row)
    assert sizes.sum() / ((best_fit(sizes, row).max() + 1) * row) > 0.98


@given(st.lists(st.integers(2, 9), max_size=6), st.integers(0, 5))
def test_a_row_gives_back_its_pieces_and_counts_only_them(sizes: list[int], extra: int) -> None:
    spans = [np.arange(100 * number, 100 * number + n) for number, n in enumerate(sizes)]
    taken = sum(sizes) - len(sizes)
    row = fill_row(spans, taken + extra, pad_id=7)
    assert row["loss_weights"].sum() == taken
    for number, span in enumerate(spans):
        own = row["sequence_index"] == number
        assert row["tokens"][own].tolist() == span[:-1].tolist()
        assert row["labels"][own].tolist() == span[1:].tolist()
        assert row["position_ids"][own].tolist() == list(range(len(span) - 1))
        assert row["loss_weights"][own].all()
    padding = row["sequence_index"] == len(spans)
    assert (row["padding"] == padding).all()
    assert padding.sum() == extra
    assert (row["tokens"][padding] == 7).all()
    assert (np.diff(row["sequence_index"]) >= 0).all()


def test_a_row_has_the_types_of_a_batch() -> None:
    row = fill_row([np.arange(4, dtype=np.uint16)], 5, 0)
    assert {name: str(values.dtype) for name, values in row.items()} == {
        "tokens": "int64",
        "labels": "int64",
        "loss_weights": "float32",
        "padding": "bool",
        "position_ids": "int64",
        "sequence_index": "int32",
    }


@pytest.mark.parametrize("sizes", [[1], [4, 4]])
def test_pieces_that_have_no_label_or_do_not_fit_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="do not make a row of 5"):
        fill_row([np.arange(size) for size in sizes], 5, 0)
