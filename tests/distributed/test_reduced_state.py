"""Moments in fewer bits under tensor and data parallelism, against one process."""

from itertools import product
from typing import Any

import pytest
import torch.distributed as dist

from hybrid_train.runtime import cpu
from hybrid_train.schema.optimizer import AdamW, MomentFormat
from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
STEPS = 6
PLANS = {"TP2": Parallel(tensor=2), "DP2": Parallel()}
HALF_A_SPACING = {"bfloat16": 2**-8, "float16": 2**-11}


def run(plan: Parallel, moments: str) -> list[float]:
    """Take some steps on all processes; return the losses."""
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    groups = build_groups(plan, timeout_s=60)
    job = tiny_job(parallel=plan)
    job.train.microbatch = 1
    both = MomentFormat(moments)
    job.optimizer = AdamW(first_moment=both, second_moment=both)
    engine: Any = tiny_engine(job, groups)
    batches = microbatches(some_rows()[groups.dp.rank() :: groups.dp.size()], 1)
    losses = [engine.step(batches, tokens_seen=0).loss for _ in range(STEPS)]
    dist.barrier()
    destroy_groups()
    return losses


@pytest.mark.parametrize(
    ("plan", "moments"),
    sampled(product(PLANS, ("bfloat16", "float16"))),
)
def test_the_loss_is_that_of_one_process(plan: str, moments: str) -> None:
    (expected,) = run_distributed(run, 1, Parallel(), moments)
    found = run_distributed(run, 2, PLANS[plan], moments)
    assert found[0] == found[1]
    assert expected[0] > expected[-1] + 0.5
    # A layout rounds some moments the other way, and has scales of its own for parts of a tensor:
    # at most what all roundings together do to a loss (tests/unit/optim/test_reduced_state.py).
    share = HALF_A_SPACING[moments] * (1 / (1 - 0.9**2) ** 0.5 + 0.5 / (1 - 0.95**2) ** 0.5)
    assert found[0] == pytest.approx(expected, abs=share * (expected[0] - expected[-1]))
