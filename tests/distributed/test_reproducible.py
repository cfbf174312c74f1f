"""The same seed and layout give the same run to the bit, twice."""

import pytest
import torch

from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
LAYOUTS = {"data": Parallel(), "tensor": Parallel(tensor=2)}


def _run_twice(parallel: Parallel) -> None:
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    runs = []
    for _ in range(2):
        groups = build_groups(parallel, timeout_s=60)
        job = tiny_job(parallel=parallel)
        engine = tiny_engine(job, groups)
        size, rank = groups.dp.size(), groups.dp.rank()
        rows = torch.cat(some_rows().split(2)[rank::size])
        batches = microbatches(rows, 2)
        reports = [engine.step(batches, tokens_seen=0) for _ in range(4)]
        lines = [(r.loss, r.grad_norm, r.lr, r.metrics) for r in reports]
        state = engine.network.chunks[0].module.state_dict()
        tensors = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
        runs.append((lines, tensors))
        destroy_groups()
    (lines, tensors), (again, tensors_again) = runs
    assert again == lines
    assert len({loss for loss, *_ in lines}) == len(lines)  # weights moved in every step
    assert [k for k in tensors if not torch.equal(tensors[k], tensors_again[k])] == []


@pytest.mark.parametrize("layout", sampled(LAYOUTS, "tensor"))
def test_two_runs_of_a_layout_are_equal_to_the_bit(layout: str) -> None:
    run_distributed(_run_twice, 2, LAYOUTS[layout])
