"""Chunks of a range of elements: all of it, in order, in few parts."""

import math

from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.checkpoint.shards import TensorChunk, tensor_chunks

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape and a range of its elements."""
    shape = draw(shapes)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


def elements(shape: tuple[int, ...], tensor_chunk: TensorChunk) -> list[int]:
    """Number the elements of a chunk, row by row, as the tensor counts them."""
    numbers = [0]
    for axis, (first, size) in enumerate(zip(tensor_chunk.offset, tensor_chunk.size, strict=True)):
        stride = math.prod(shape[axis + 1 :])
        numbers = [number + stride * (first + i) for number in numbers for i in range(size)]
    return numbers


@given(ranges())
def test_boxes_hold_every_element_of_the_range_once_and_in_order(
    given_range: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, stop = given_range
    found = list(tensor_chunks(shape, start, stop))
    assert [n for tensor_chunk in found for n in elements(shape, tensor_chunk)] == list(
        range(start, stop)
    )
    assert all(tensor_chunk.numel == len(elements(shape, tensor_chunk)) for tensor_chunk in found)


@given(ranges())
def test_there_are_at_most_two_boxes_for_each_axis_but_the_first(
    given_range: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, stop = given_range
    assert len(list(tensor_chunks(shape, start, stop))) <= max(1, 2 * len(shape) - 1)


def test_a_range_that_needs_most_boxes_gets_them() -> None:
    assert (
        len(list(tensor_chunks((3, 3, 3), 1, 26))) == 5
    )  # 2 elements, 2 rows, 1 plane, 2 rows, 2 elements


def test_a_whole_tensor_is_one_box() -> None:
    assert list(tensor_chunks((4, 3, 2), 0, 24)) == [TensorChunk((0, 0, 0), (4, 3, 2))]


def test_an_empty_range_has_no_boxes() -> None:
    assert list(tensor_chunks((4, 0), 0, 0)) == []
