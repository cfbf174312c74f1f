"""What ranks call is recorded as torch sees it; a rank that calls otherwise is named."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from hybrid_train.planning.agreement import RECEIVE, SEND, Call
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS
BOTH = (0, 1)


@pytest.fixture
def recorder() -> Iterator[Any]:
    """Record what the first of two processes calls; the other is not there."""
    from hybrid_train.jobs.built_rank import one_rank

    with one_rank(0, 2):
        from hybrid_train.jobs.twin_ranks import Recorder

        calls: list[Call] = []
        recorder = Recorder(calls.append)
        recorder.calls = calls
        yield recorder


def test_collectives_and_transfers_are_told_with_sizes_and_bytes(recorder: Any) -> None:
    import torch
    import torch.distributed as dist

    four, eight = torch.ones(4), torch.empty(8)
    with recorder:
        dist.all_reduce(four)
        dist.all_gather_into_tensor(eight, four)
        dist.reduce_scatter_tensor(four, eight)
        dist.broadcast(torch.ones(2, dtype=torch.int64), src=1)
        dist.send(four, 1)
        dist.recv(eight, 1)
        torch.ones(3).add_(1)  # talks to nobody
    group, told = ("default_pg", BOTH), recorder.calls
    assert told[0] == Call("all-reduce", group, ("float32[4]",), ("float32[4]",), 16)
    assert told[1] == Call("all-gather", group, ("float32[4]",), ("float32[8]",), 16)
    assert told[2] == Call("reduce-scatter", group, ("float32[8]",), ("float32[4]",), 32)
    assert told[3] == Call("broadcast", group, ("int64[2]",), ("int64[2]",), 16, peer=1)
    assert told[4] == Call(SEND, group, ("float32[4]",), (), 16, peer=1)
    assert told[5:] == [Call(RECEIVE, group, (), ("float32[8]",), 0, peer=1)]


@pytest.mark.parametrize(
    ("splits", "expected"), [({}, ((2, 2), (2, 2))), ("own", ((1, 3), (3, 1)))]
)
def test_the_rows_of_an_all_to_all_are_told(recorder: Any, splits: Any, expected: Any) -> None:
    import torch
    import torch.distributed as dist

    given, taken = torch.ones(4, 3), torch.empty(4, 3)
    named = {"output_split_sizes": [3, 1], "input_split_sizes": [1, 3]} if splits else {}
    with recorder:
        dist.all_to_all_single(taken, given, **named)
    (call,) = recorder.calls
    assert (call.kind, call.bytes, call.splits) == ("all-to-all", 48, expected)


def test_a_group_of_one_calls_nobody(recorder: Any) -> None:
    import torch
    import torch.distributed as dist

    alone = dist.new_group([0])
    with recorder:
        dist.broadcast(torch.ones(4), src=0, group=alone)
    assert recorder.calls == []


def step(fault: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.planted_calls", fault]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_ranks_of_a_sound_step_agree() -> None:
    found = step("none")
    assert (found["faults"], found["failures"]) == ([], {})
    assert len(found["calls"]) == 4
    assert min(found["calls"].values()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["leaves_one_out", "swaps_two"])
def test_a_call_that_a_rank_leaves_out_or_makes_late_is_named(fault: str) -> None:
    """Rank 0 waits in the very call; rank 1 is in the next one, which is of another group."""
    found = step(fault)
    (words,) = found["faults"]
    assert "all-reduce of float32[1280] of group TENSOR_MODEL_PARALLEL_GROUP (ranks 0, 1)" in words
    assert "rank 1 in its call" in words
    assert set(found["failures"]) == {"0", "1", "2", "3"}


@pytest.mark.slow
def test_another_size_of_one_rank_is_named() -> None:
    (words,) = step("gives_another_size")["faults"]
    assert words.startswith("call ")
    assert "rank 0: all-reduce of float32[1280]; rank 1: all-reduce of float32[1281]" in words
