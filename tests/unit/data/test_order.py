"""Orders without memory: they are permutations, they look random, they keep their shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.data.order import BlendOrder, Permutation


@given(st.integers(1, 5000), st.integers(0, 2**64))
def test_every_index_comes_once(size: int, key: int) -> None:
    images = Permutation(size, [key])(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))


def test_any_part_can_be_asked_for_in_any_order() -> None:
    order = Permutation(1000, ["a", 1])
    whole = order(np.arange(1000))
    asked = np.array([999, 3, 500, 3])
    assert order(asked).tolist() == whole[asked].tolist()


def test_another_key_is_another_order_and_parts_of_a_key_are_told_apart() -> None:
    orders = [
        Permutation(1000, key)(np.arange(1000)).tolist() for key in ([1, 23], [12, 3], [1, 2])
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_places_are_taken_as_evenly_as_chance_would() -> None:
    # Where index 0 .. 9 go over 4000 keys: chi-square over 10 x 10 bins of 400 expected each.
    size, keys = 10, 4000
    images = np.stack([Permutation(size, [key])(np.arange(size)) for key in range(keys)])
    counts = np.stack([np.bincount(column, minlength=size) for column in images.T])
    statistic = ((counts - keys / size) ** 2 / (keys / size)).sum()
    # 81 degrees of freedom: mean 81, standard deviation 12.7. Six of those above the mean.
    assert statistic < 81 + 6 * 12.7


def test_neighbours_do_not_stay_neighbours() -> None:
    size = 100_000
    images = Permutation(size, [5])(np.arange(size))
    steps = np.diff(images)
    # Two random places are within 10 of each other with probability 20 / size: 20 expected.
    assert (np.abs(steps) <= 10).sum() < 20 + 6 * 20**0.5
    # Of a random order the correlation of neighbours has a deviation of size ** -0.5.
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 6 * size**-0.5


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda weights: sum(weights) > 0.01),
    st.integers(0, 1000),
)
def test_a_source_is_never_far_from_its_share(weights: list[float], seed: int) -> None:
    rows = 3000
    drawn = BlendOrder(weights, seed).sources(0, rows)
    shares = np.array(weights) / sum(weights)
    counts = np.stack([np.cumsum(drawn == number) for number in range(len(weights))])
    off = counts - shares[:, None] * np.arange(1, rows + 1)
    # The fractions of the golden ratio: the discrepancy of n of them is below 3 + ln(n) (a bound
    # for bounded quotients; Niederreiter, Random Number Generation, theorem 3.4, with quotients 1).
    assert np.abs(off).max() < 3 + np.log(rows)


def test_a_source_without_weight_is_never_drawn() -> None:
    drawn = BlendOrder([0, 0.5, 0, 0.5, 0]).sources(0, 100_000)
    assert set(drawn.tolist()) == {1, 3}


@pytest.mark.parametrize("asked", [[0, 10, 2_500_000], [2_500_000, 10, 0]])
def test_counts_do_not_depend_on_what_was_asked_before(asked: list[int]) -> None:
    order = BlendOrder([0.7, 0.2, 0.1], seed=3)
    for rows in asked:
        expected = np.bincount(order.sources(0, rows), minlength=3)
        assert order.counts(rows).tolist() == expected.tolist()
