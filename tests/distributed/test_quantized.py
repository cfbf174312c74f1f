"""Ranks that share a tensor agree on what scales it (fp8_delayed)."""

from typing import Any

import pytest
from torch import distributed as dist

from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from tests.distributed.launch import run_distributed
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
PLANS = {
    "data": Parallel(),
    "tensor": Parallel(tensor=2),
    "context": Parallel(context=2),
}


def _remembered(parallel: Parallel) -> tuple[list[float], list[float]]:
    """What a rank saw in a step, and what it remembers of it, history by history."""
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    groups = build_groups(parallel, timeout_s=60)
    try:
        job = tiny_job("M*-", parallel=parallel, precision=Precision(format=GemmFormat.fp8_delayed))
        engine = tiny_engine(job, groups)
        histories = engine.network.quantized.histories
        saw: list[float] = []
        roll = engine.network.quantized.end_step

        def end_step() -> None:
            saw.extend(float(history.seen) for history in histories)
            roll()

        engine.network.quantized.end_step = end_step
        rows = some_rows(seed=dist.get_rank() if parallel == Parallel() else 0)
        batches: Any = microbatches(rows, 2)
        engine.step(batches, tokens_seen=0)
        return saw, [float(history._earlier[0]) for history in histories]
    finally:
        destroy_groups()


@pytest.mark.parametrize("name", sampled(PLANS, "tensor"))
def test_all_ranks_remember_the_largest_value_of_any(name: str) -> None:
    (saw, remembered), (other_saw, other_remembered) = run_distributed(_remembered, 2, PLANS[name])
    assert remembered == other_remembered == list(map(max, saw, other_saw))
    assert saw != other_saw
