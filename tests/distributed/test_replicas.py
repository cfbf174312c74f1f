"""A bit that turns in one process is named with its tensor and its rank, and nothing else is."""

from typing import Any

import pytest
import torch
from torch import distributed as dist

from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
# Layout, processes, and for weights in which a bit turns the ranks that hold them alike.
NORM, EXPERT, BIAS = "mixer.norm.weight", "mlp.experts.linear_fc1.weight", "router.expert_bias"
GATE = "mlp.router.weight"
CASES: dict[str, tuple[Parallel, int, dict[str, set[int]]]] = {
    "DP3": (Parallel(), 3, {NORM: {0, 1, 2}, BIAS: {0, 1, 2}}),
    "DP2, overlapped": (
        # Weights are gathered anew before they are used or compared: rank 0 has this one right.
        Parallel(overlap_grad_reduce=True, overlap_param_gather=True), 2,
        {NORM: set(), BIAS: {0, 1}},
    ),
    "TP2": (Parallel(tensor=2), 2, {GATE: {0, 1}, BIAS: {0, 1}}),
    "EP2": (Parallel(expert=2), 2, {GATE: {0, 1}, EXPERT: set()}),
}  # fmt: skip


def _differences(case: str) -> list[tuple[list[Any], list[tuple[str, list[Any]]]]]:
    """Return what is found behind a step, and behind a bit turned in each weight on rank 1."""
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups, different_replicas

    parallel, _, turned = CASES[case]
    groups = build_groups(parallel, timeout_s=60)
    try:
        job = tiny_job("ME", parallel=parallel)
        job.train.microbatch = 1
        job.train.global_batch = 2 * groups.dp.size()
        engine = tiny_engine(job, groups)
        rows = some_rows()[groups.dp.rank() :: groups.dp.size()]
        engine.step(microbatches(rows, 1), tokens_seen=0)
        network = engine.network
        sound = different_replicas(network.chunks, groups)
        found = []
        for ending in turned:
            (tensor,) = _named(network.chunks[0].module, ending)
            kept = tensor.detach().clone()
            if dist.get_rank() == 1:
                tensor.detach().view(-1).view(torch.int32)[0] ^= 1  # the last bit of a float32
            found.append((ending, different_replicas(network.chunks, groups)))
            tensor.detach().copy_(kept)
        return [(sound, found)]
    finally:
        destroy_groups()


def _named(module: Any, ending: str) -> list[torch.Tensor]:
    pairs = (*module.named_parameters(), *module.named_buffers())
    return [tensor for name, tensor in pairs if name.rstrip("0123456789").endswith(ending)][:1]


@pytest.mark.parametrize("case", sampled(CASES, "DP3", "TP2"))
def test_a_turned_bit_is_named_with_rank_and_tensor(case: str) -> None:
    _, processes, turned = CASES[case]
    for rank, [(sound, found)] in enumerate(run_distributed(_differences, processes, case)):
        assert sound == []
        for ending, differences in found:
            alike = turned[ending]
            if rank not in alike:
                assert differences == []
                continue
            (one,) = {(each.name, each.ranks) for each in differences}
            assert ending in one[0]
            assert one[1] == ((1,) if len(alike) > 2 else tuple(sorted(alike)))
