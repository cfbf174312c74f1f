"""Checkpoints move: saved under one layout, loaded under another, training goes on alike."""

from functools import cache

import pytest

from tests.distributed.reshard import LAYOUTS, PAIRS, SAMPLED, TESTED, Pairs, Row, reshard_table
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("reshard")]
Table = dict[tuple[str, str], Row]
OTHERS = tuple(pair for pair in TESTED if pair not in SAMPLED)
each_pair = pytest.mark.parametrize(("saved", "loaded"), sampled(TESTED, *SAMPLED))


@cache
def table(pairs: Pairs) -> Table:
    return {(row.saved_under, row.loaded_under): row for row in reshard_table(pairs)}


@pytest.fixture
def row(saved: str, loaded: str) -> Row:
    pair = saved, loaded
    return table(SAMPLED if pair in SAMPLED else OTHERS)[pair]


@each_pair
def test_weights_and_optimizer_state_are_equal_to_the_bit_when_saved_again(
    row: Row,
) -> None:
    assert row.different == []


@each_pair
def test_training_goes_on_as_in_the_run_that_never_stopped(row: Row) -> None:
    assert row.ulps <= row.allowed_ulps  # derived in reshard.py
    assert row.expected[0] > row.expected[-1] + 0.5  # a curve, not a level


@pytest.mark.slow
def test_every_layout_stores_the_same_tensors() -> None:
    for kind in ((False,) * 3, (True, False, False), (False, True, False), (False, False, True)):
        rows = (table(SAMPLED) | table(OTHERS)).values()
        saved = [(row.tensors, LAYOUTS[row.saved_under]) for row in rows]
        tensors = {number for number, one in saved if (one.bf16, one.unequal, one.dense) == kind}
        assert len(tensors) == 1


def test_every_layout_is_saved_under_or_loaded_under() -> None:
    assert set(SAMPLED) < set(TESTED) <= set(PAIRS)
    assert {name for pair in TESTED for name in pair} == set(LAYOUTS)
