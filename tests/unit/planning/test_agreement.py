"""Ranks that call each other alike run to their end; every planted difference is named."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from hybrid_train.planning.agreement import (
    ALL_TO_ALL,
    RECEIVE,
    SEND,
    Call,
    bytes_by_kind,
    faults,
)

ALL, PAIR = ("data", (0, 1, 2)), ("tensor", (0, 1))
Lists = dict[int, list[Call]]


def reduced(size: int, group: tuple[str, tuple[int, ...]] = ALL) -> Call:
    return Call("all-reduce", group, (f"float32[{size}]",), (f"float32[{size}]",), 4 * size)


def gathered(size: int) -> Call:
    return Call("all-gather", ALL, (f"float32[{size}]",), (f"float32[{3 * size}]",), 4 * size)


def alike() -> Lists:
    """Three ranks; the first two have a group of their own and exchange a tensor."""
    calls: Lists = {rank: [reduced(8), gathered(4), reduced(2)] for rank in range(3)}
    for rank in PAIR[1]:
        calls[rank].insert(1, reduced(5, PAIR))
    calls[0].append(Call(SEND, ALL, ("float32[7]",), (), 28, peer=1))
    calls[1].append(Call(RECEIVE, ALL, (), ("float32[7]",), peer=0))
    return calls


def test_ranks_that_call_alike_have_no_fault() -> None:
    assert list(faults(alike())) == []


def leaves_one_out(calls: Lists) -> None:
    del calls[1][0]


def swaps_two(calls: Lists) -> None:
    calls[2][0], calls[2][1] = calls[2][1], calls[2][0]


def gives_another_size(calls: Lists) -> None:
    calls[1][2] = gathered(3)


def ends_early(calls: Lists) -> None:
    del calls[2][-1]


def does_not_receive(calls: Lists) -> None:
    del calls[1][-1]


def receives_another_size(calls: Lists) -> None:
    calls[1][-1] = replace(calls[1][-1], taken=("float32[6]",))


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (
            leaves_one_out,
            "call 1 of group data (ranks 0, 1, 2) differs: ranks 0, 2: all-reduce of float32[8]; "
            "rank 1: all-gather of float32[4]",
        ),
        (
            swaps_two,
            "call 1 of group data (ranks 0, 1, 2) differs: ranks 0, 1: all-reduce of float32[8]; "
            "rank 2: all-gather of float32[4]",
        ),
        (
            gives_another_size,
            "call 2 of group data (ranks 0, 1, 2) differs: ranks 0, 2: all-gather of float32[4]; "
            "rank 1: all-gather of float32[3]",
        ),
        (
            ends_early,
            "call 3 of group data (ranks 0, 1, 2) differs: ranks 0, 1: all-reduce of float32[2]; "
            "rank 2: no further call",
        ),
        (
            does_not_receive,
            "transfer 1 from rank 0 to rank 1 in group data differs: send of float32[7] to rank 1; "
            "nothing is received",
        ),
        (
            receives_another_size,
            "transfer 1 from rank 0 to rank 1 in group data differs: send of float32[7] to rank 1; "
            "recv of float32[6] from rank 0",
        ),
    ],
)
def test_a_planted_difference_is_named_with_its_ranks_and_its_place(
    plant: Callable[[Lists], None], words: str
) -> None:
    calls = alike()
    plant(calls)
    assert list(faults(calls)) == [words]


def test_the_same_calls_of_two_groups_in_another_order_are_a_circle() -> None:
    calls = alike()
    calls[1][0], calls[1][1] = calls[1][1], calls[1][0]
    (found,) = faults(calls)
    assert found.startswith(
        "ranks wait for each other in different groups: rank 0 in its call 1, all"
    )
    assert "rank 1 in its call 1, all-reduce of float32[5] of group tensor (ranks 0, 1)" in found


def test_what_a_stopped_rank_would_have_called_is_not_held_against_it() -> None:
    calls = alike()
    ends_early(calls)
    does_not_receive(calls)
    # The others wait for the rank that was stopped: that is no difference, but it is said.
    (found,) = faults(calls, unfinished=[1, 2])
    assert "rank 0 in its call 4, all-reduce of float32[2]" in found
    gives_another_size(calls)
    (found,) = faults(calls, unfinished=[1, 2])
    assert found.startswith("call 2 of group data")


def exchanged(given: tuple[int, ...], taken: tuple[int, ...]) -> Call:
    sizes = (f"float32[{sum(given)}]",), (f"float32[{sum(taken)}]",)
    return Call(ALL_TO_ALL, PAIR, *sizes, splits=(given, taken))


def test_rows_of_an_all_to_all_may_differ_but_must_fit_in_pairs() -> None:
    calls = {0: [exchanged((1, 2), (1, 3))], 1: [exchanged((3, 4), (2, 4))]}
    assert list(faults(calls)) == []
    calls[1] = [exchanged((3, 4), (1, 4))]
    (found,) = faults(calls)
    assert "rank 1: all-to-all of float32[7] in rows [3, 4], for rows [1, 4]" in found


def test_a_broadcast_comes_from_the_same_rank_for_all() -> None:
    given = ("int64[1]",)
    calls = {rank: [Call("broadcast", PAIR, given, given, peer=rank)] for rank in (0, 1)}
    (found,) = faults(calls)
    assert "rank 0: broadcast of int64[1] from rank 0; rank 1: broadcast" in found


def test_bytes_are_summed_by_kind_over_all_ranks() -> None:
    assert bytes_by_kind(alike()) == {
        "all-reduce": (8, 3 * 4 * 10 + 2 * 4 * 5),
        "all-gather": (3, 3 * 16),
        SEND: (1, 28),
        RECEIVE: (1, 0),
    }
