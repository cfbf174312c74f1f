"""Plain concatenation: every token once an epoch, in any phase, from anywhere."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.data.documents import Joined
from hybrid_train.data.index_cache import IndexCache
from hybrid_train.data.stream import Stream, StreamPosition, StreamRows
from tests.unit.data.documents import Listed, listed, random_lengths

NOWHERE = IndexCache(None)


def stream(documents: Joined, seed: int = 1, cache: IndexCache = NOWHERE) -> Stream:
    return Stream(documents, key=(seed, documents.name), cache=cache)


def tokens(source: Stream, first: int, last: int) -> list[int]:
    spans = source.spans(first, last - first)
    return np.concatenate([source.documents.read(span) for span in spans]).tolist()


def inputs(rows: StreamRows, first: int, last: int) -> list[list[int]]:
    return [rows.fill(row)["tokens"].tolist() for row in range(first, last)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(0, 3))
def test_every_epoch_has_every_token_once_in_whole_documents(
    lengths: list[int], epoch: int
) -> None:
    documents = listed(*lengths)
    size = documents.tokens
    found = tokens(stream(documents), epoch * size, (epoch + 1) * size)
    whole = [1000 * number + t for number, length in enumerate(lengths) for t in range(length)]
    assert sorted(found) == whole
    assert sum(b == a + 1 for a, b in pairwise(found)) >= size - len(lengths)


@given(st.integers(0, 2000), st.integers(1, 500))
def test_any_part_of_the_stream_can_be_read_alone(first: int, count: int) -> None:
    source = stream(listed(*random_lengths(100, 12)))
    whole = tokens(source, 0, 2500)
    assert tokens(source, first, first + count) == whole[first : first + count]


def test_labels_are_the_next_tokens_of_the_stream() -> None:
    source = stream(listed(*random_lengths(50, 20)))
    rows = StreamRows(source, length=8)
    for row in range(10):
        fields = rows.fill(row)
        assert fields["labels"][:-1].tolist() == fields["tokens"][1:].tolist()
        assert fields["position_ids"].tolist() == list(range(8))
        assert fields["loss_weights"].tolist() == [1] * 8
    first = {fields["tokens"][0]: fields for fields in map(rows.fill, range(rows.first_epoch()))}
    followed = [fields for fields in first.values() if fields["labels"][-1] in first]
    assert len(followed) > 20  # the last label of a row is the first token of another


def test_rows_of_an_epoch_are_shuffled_and_none_is_lost() -> None:
    source = stream(listed(*random_lengths(60, 20)))
    rows = StreamRows(source, length=8)
    count = rows.first_epoch()
    starts = [fields[0] for fields in inputs(rows, 0, count)]
    in_order = [tokens(source, 8 * row, 8 * row + 1)[0] for row in range(count)]
    assert starts != in_order
    # The last row of an epoch may begin in it and end in the next, so one place may differ.
    assert len(set(starts) - set(in_order)) <= 1


PHASES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=4)


@pytest.mark.slow
@given(PHASES, st.integers(1, 50))
def test_phases_with_other_rows_lose_no_token(phases: list[tuple[int, int]], window: int) -> None:
    source = stream(listed(*random_lengths(20, 9)))
    place, read = StreamPosition(), []
    for count, length in phases:
        rows = StreamRows(source, length=length, begin=place, window=window)
        read += [t for row in inputs(rows, 0, count) for t in row]
        place = rows.end(count)
    rest = [t for start, stop in place.left_over for t in tokens(source, start, stop)]
    assert sorted(read + rest) == sorted(tokens(source, 0, place.position) if read + rest else [])


def test_what_is_left_over_is_not_labelled_with_what_does_not_follow() -> None:
    source = stream(listed(*random_lengths(40, 9)))
    first = StreamRows(source, length=4, window=16)
    place = first.end(5)
    assert len(place.left_over) > 1
    order = tokens(source, 0, 200)
    follows = set(pairwise(order))
    second = StreamRows(source, length=6, begin=place)
    masked = 0
    for row in range(12):
        fields = second.fill(row)
        masked += int((fields["loss_weights"] == 0).sum())
        for token, label, mask in zip(
            *(fields[k].tolist() for k in ("tokens", "labels", "loss_weights")), strict=True
        ):
            assert not mask or (token, label) in follows
    assert masked == len(place.left_over)


def test_windows_are_shuffled_one_after_the_other() -> None:
    source = stream(listed(*random_lengths(60, 20)))
    rows = StreamRows(source, length=8, window=10)
    starts = [fields[0] for fields in inputs(rows, 0, 30)]
    in_order = [tokens(source, 8 * row, 8 * row + 1)[0] for row in range(30)]
    for first in (0, 10, 20):
        assert starts[first : first + 10] != in_order[first : first + 10]
        assert sorted(starts[first : first + 10]) == sorted(in_order[first : first + 10])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    documents = listed(*random_lengths(60, 20))
    size = documents.tokens
    orders = [tokens(stream(documents), n * size, (n + 1) * size) for n in range(3)]
    orders.append(tokens(stream(documents, seed=2), 0, size))
    assert len({tuple(order) for order in orders}) == 4


def test_a_source_shorter_than_a_row_is_repeated_within_it() -> None:
    fields = StreamRows(stream(listed(3)), length=8).fill(0)
    assert fields["tokens"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_files_of_a_source_are_one_set_of_documents() -> None:
    documents = Joined("both", [Listed([4, 2], "a"), Listed([3], "b")])
    assert documents.tokens == 9
    found = tokens(stream(documents), 0, 9)
    # Document numbers are those of the file: 0 and 1 of the first, 0 of the second.
    assert sorted(found) == sorted([0, 1, 2, 3, 1000, 1001, 0, 1, 2])
    assert [documents.file_of(number) for number in range(3)] == [("a", 0), ("a", 1), ("b", 0)]


def test_a_large_index_is_kept_on_disk_under_what_it_depends_on(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path, keep_from=50)
    large, small = listed(*random_lengths(60, 20)), listed(*random_lengths(40, 20))
    StreamRows(stream(large, cache=cache), length=8).prepare(1)
    StreamRows(stream(small, cache=cache), length=8).prepare(1)
    (kept,) = tmp_path.iterdir()
    assert tokens(stream(large, cache=cache), 0, 500) == tokens(stream(large), 0, 500)
    changed = listed(*random_lengths(60, 20, seed=7))
    assert tokens(stream(changed, cache=cache), 0, 500) == tokens(stream(changed), 0, 500)
    stream(large, seed=2, cache=cache).spans(0, 1)
    assert len(list(tmp_path.iterdir())) == 3
    assert kept.exists()


def test_many_that_build_the_same_index_at_once_all_find_it_whole(tmp_path: Path) -> None:
    documents = listed(*random_lengths(5000, 20))
    expected = tokens(stream(documents), 0, 5000)

    def read(_: int) -> list[int]:
        return tokens(stream(documents, cache=IndexCache(tmp_path, keep_from=1)), 0, 5000)

    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(read, range(32)))
    assert len(list(tmp_path.iterdir())) == 1  # and nothing half-written is left


def test_an_index_that_was_half_written_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, documents = IndexCache(tmp_path, keep_from=1), listed(*random_lengths(60, 20))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            stream(documents, cache=cache).spans(0, 1)
    assert list(tmp_path.iterdir()) == []
    assert tokens(stream(documents, cache=cache), 0, 99) == tokens(stream(documents), 0, 99)
