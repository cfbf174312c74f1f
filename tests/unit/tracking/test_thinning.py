"""Few points show what many did."""

import math
import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.tracking.plotly import highest, sampled, thin


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(min_value=1, max_value=20)
)
def test_lowest_and_highest_of_every_column_stay(ys: list[float], columns: int) -> None:
    xs = [float(n) for n in range(len(ys))]
    kept = thin(xs, ys, columns)
    assert len(kept) <= max(2 * columns, len(ys) if len(ys) <= 2 * columns else 0)
    assert set(kept) <= set(zip(xs, ys, strict=True))
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert max(y for _, y in kept) == max(ys)
    assert min(y for _, y in kept) == min(ys)


def test_a_spike_of_one_step_in_a_hundred_thousand_stays_in_its_place() -> None:
    generator = random.Random(0)
    xs = [float(n) for n in range(100_000)]
    ys = [generator.random() for _ in xs]
    ys[61_803], ys[7] = 50.0, -50.0
    kept = thin(xs, ys, 480)
    assert len(kept) <= 960
    assert (61_803.0, 50.0) in kept
    assert (7.0, -50.0) in kept


def test_a_curve_is_broken_where_values_are_not_finite() -> None:
    xs = [float(n) for n in range(1000)]
    ys = [math.nan if 500 <= n < 600 else 1.0 for n in range(1000)]
    kept = thin(xs, ys, 10)
    assert [math.isnan(y) for _, y in kept].count(True) == 1
    assert thin([1.0, 2.0], [math.nan, 3.0], 10)[1] == (2.0, 3.0)


def test_columns_of_a_table_have_their_highest_value() -> None:
    xs, ys = [1.0, 2.0, 3.0, 4.0, 9.0], [5.0, 1.0, math.nan, 2.0, 7.0]
    assert highest(xs, ys, [1.0, 3.0, 5.0, 7.0, 9.0]) == [5.0, 2.0, None, 7.0]


def test_a_smooth_curve_keeps_its_ends_and_points_equally_far_apart() -> None:
    xs = [float(n) for n in range(1001)]
    kept = sampled(xs, xs, 100)
    assert len(kept) <= 101
    assert (kept[0], kept[-1]) == ((0.0, 0.0), (1000.0, 1000.0))
    inner = [x for x, _ in kept[:-1]]
    assert {after - before for before, after in pairwise(inner)} == {11}
    assert sampled([], [], 5) == []
    assert sampled([1.0], [2.0], 5) == [(1.0, 2.0)]
