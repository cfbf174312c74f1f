"""Recomputed activations give the same steps to the bit on two processes too."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.runtime import cpu
from hybrid_train.schema.model import Mtp
from hybrid_train.schema.parallel import Parallel, Recompute
from tests.distributed.launch import run_distributed
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
LAYOUTS = {
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "data, gradients reduced on the way": {"overlap_grad_reduce": True},
}


def steps(parallel: Parallel, groups: Any) -> tuple[list[tuple[float, float]], list[Tensor]]:
    job = tiny_job("MEM|*M-/*E/*E" if parallel.pipeline == 2 else "MEM*M-/*E/*E", parallel=parallel)
    # A block that serves two depths sums its gradients in another order when it is recomputed.
    job.model.mtp = Mtp(repeated_block=False)
    job.train.microbatch = 1
    job.objective.moe_aux_loss_scale = 0.1  # large enough to be seen in the gradient
    engine = tiny_engine(job, groups)
    size, rank = groups.dp.size(), groups.dp.rank()
    batches = microbatches(some_rows()[rank::size], 1)
    reports = [engine.step(batches, tokens_seen=0) for _ in range(3)]
    weights = [w.detach().clone() for chunk in engine.network.chunks for w in chunk.parameters()]
    gradients = [w.main_grad.clone() for chunk in engine.network.chunks for w in chunk.parameters()]
    return [(report.loss, report.grad_norm) for report in reports], weights + gradients


def _compare(layout: dict[str, Any]) -> None:
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    found = {}
    for recompute in Recompute:
        parallel = Parallel(recompute=recompute, **layout)
        groups = build_groups(parallel, timeout_s=60)
        found[recompute] = steps(parallel, groups)
        destroy_groups()
    reports, tensors = found[Recompute.none]
    for other in (Recompute.selective, Recompute.full):
        assert found[other][0] == reports, other
        pairs = zip(found[other][1], tensors, strict=True)
        assert all(torch.equal(one, two) for one, two in pairs), other


@pytest.mark.parametrize(
    "layout",
    sampled(LAYOUTS),
)
def test_recomputation_changes_no_bit(layout: str) -> None:
    run_distributed(_compare, 2, LAYOUTS[layout])
