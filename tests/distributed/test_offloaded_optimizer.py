"""A share of the optimizer in host memory, under layouts that split its state and its experts."""

from typing import Any

import pytest
import torch.distributed as dist

from hybrid_train.runtime import cpu
from hybrid_train.schema.optimizer import AdamW
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from tests.distributed.launch import run_distributed
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
STEPS = 4
PLANS = {
    "DP2": Parallel(),
    "DP2, overlapped": Parallel(overlap_grad_reduce=True, overlap_param_gather=True),
    "TP2": Parallel(tensor=2),
    "PP2 x VPP2": Parallel(pipeline=2, virtual_pipeline=2),
    "EP2": Parallel(expert=2),
}


def run(plan: Parallel) -> list[list[tuple[float, float]]]:
    """Take some steps on all processes, with one share after the other."""
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    groups = build_groups(plan, timeout_s=60)
    found = []
    for share in (0, 0.3, 1):
        pattern = "M|EM*|M-|E" if plan.pipeline > 1 else "MEM*M-E"
        job = tiny_job(pattern, parallel=plan, precision=Precision(format=GemmFormat.bf16))
        job.train.microbatch = 1
        job.optimizer = AdamW(offload_share=share)
        engine: Any = tiny_engine(job, groups)
        batches = microbatches(some_rows()[groups.dp.rank() :: groups.dp.size()], 1)
        reports = [engine.step(batches, tokens_seen=0) for _ in range(STEPS)]
        found.append([(report.loss, report.grad_norm) for report in reports])
    dist.barrier()
    destroy_groups()
    return found


@pytest.mark.parametrize("plan", sampled(PLANS, "DP2, overlapped"))
def test_steps_are_to_the_bit_those_of_the_whole_optimizer(plan: str) -> None:
    first, second = run_distributed(run, 2, PLANS[plan])
    assert first == second
    whole, *shared = first
    assert whole[0][0] > whole[-1][0] + 0.1
    for one in shared:
        assert one == whole
