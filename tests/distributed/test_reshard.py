"""Checkpoints move: saved under one layout, loaded under another, training goes on alike."""

import pytest

from tests.distributed.reshard import LAYOUTS, PAIRS, TESTED, Row, reshard_table
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("reshard")]
Table = dict[tuple[str, str], Row]
each_pair = pytest.mark.parametrize("pair", TESTED, ids=" to ".join)


@pytest.fixture(scope="module")
def table() -> Table:
    return {(row.saved_under, row.loaded_under): row for row in reshard_table(TESTED)}


@each_pair
def test_weights_and_optimizer_state_are_equal_to_the_bit_when_saved_again(
    table: Table, pair: tuple[str, str]
) -> None:
    assert table[pair].different == []


@each_pair
def test_training_goes_on_as_in_the_run_that_never_stopped(
    table: Table, pair: tuple[str, str]
) -> None:
    row = table[pair]
    assert row.ulps <= row.allowed_ulps  # derived in reshard.py
    assert row.expected[0] > row.expected[-1] + 0.5  # a curve, not a level


def test_every_layout_stores_the_same_tensors(table: Table) -> None:
    for kind in ((False, False), (True, False), (False, True)):
        saved = [(row.tensors, LAYOUTS[row.saved_under]) for row in table.values()]
        tensors = {number for number, one in saved if (one.bf16, one.unequal) == kind}
        assert len(tensors) == 1


def test_every_layout_is_saved_under_or_loaded_under() -> None:
    assert set(TESTED) <= set(PAIRS)
    assert {name for pair in TESTED for name in pair} == set(LAYOUTS)
