"""Parts of a tensor: all of it, each element once, or refused."""

import math
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.checkpoint.shards import is_partition, tensor_chunks


@dataclass(frozen=True)
class Part:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Part]]:
    """A shape, and chunks of ranges that follow each other, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    numel = math.prod(shape)
    cuts = draw(st.lists(st.integers(0, numel), max_size=4))
    parts = [
        Part(chunk.offset, chunk.size)
        for start, stop in pairwise(sorted([0, *cuts, numel]))
        for chunk in tensor_chunks(shape, start, stop)
    ]
    return shape, draw(st.permutations(parts))


@given(cut_tensors())
def test_boxes_of_ranges_that_follow_each_other_are_a_partition(
    cut: tuple[tuple[int, ...], list[Part]],
) -> None:
    assert is_partition(*cut)


@given(cut_tensors(), st.data())
def test_a_missing_or_doubled_or_exchanged_box_is_no_partition(
    cut: tuple[tuple[int, ...], list[Part]], data: st.DataObject
) -> None:
    shape, parts = cut
    one, other = data.draw(st.sampled_from(parts)), data.draw(st.sampled_from(parts))
    rest = [part for part in parts if part != one]
    assert not is_partition(shape, rest)
    assert not is_partition(shape, [*parts, one])
    if one != other and one.sizes == other.sizes:
        assert not is_partition(shape, [*rest, other])


def test_a_box_that_sticks_out_is_no_partition() -> None:
    assert not is_partition((4, 2), [Part((0, 0), (2, 2)), Part((3, 0), (2, 2))])


def test_boxes_beside_each_other_may_begin_in_rows_of_their_own() -> None:
    left = [Part((0, 0), (3, 1)), Part((3, 0), (1, 1))]
    right = [Part((0, 1), (1, 1)), Part((1, 1), (3, 1))]
    assert is_partition((4, 2), [*left, *right])
    assert not is_partition((4, 2), [*left, right[0], Part((1, 0), (3, 1))])
