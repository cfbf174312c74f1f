"""Logits of documents that share rows, under every kind of split, are those of each alone.

Losses and gradients of packed rows under all layouts are compared in `tests/parity`.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from hybrid_train.ops.context import in_order
from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.packed import alone_in_a_row, documents, packed_batch
from tests.tiny import MEGATRON_WARNINGS, alone, tiny_engine, tiny_job

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.slow]
PATTERN, DEPTHS, LENGTH = "ME|M*|M-|E*/*ME/*ME", 2, 16
LAYOUTS = {
    "tensor": Parallel(tensor=2),
    "pipeline": Parallel(pipeline=2),
    "virtual pipeline": Parallel(pipeline=2, virtual_pipeline=2),
    "expert": Parallel(expert=2),
    "context": Parallel(context=2),
}
PLACES = [(5, 1, 7), (3, 2, 10, 1)]  # pieces of context parallelism end at 4, 8 and 12


def rows() -> list[list[np.ndarray]]:
    return [documents(*places, seed=seed) for seed, places in enumerate(PLACES)]


def engine_of(parallel: Parallel, groups: Any) -> Any:
    """The engine of a layout; its first weights do not depend on it."""
    stages = PATTERN.split("|")
    cuts = {1: "".join(stages), 2: "|".join(["".join(stages[:2]), "".join(stages[2:])])}
    pattern = cuts.get(parallel.pipeline * parallel.virtual_pipeline, PATTERN)
    job = tiny_job(pattern, parallel=parallel)
    job.train.microbatch = 1
    return tiny_engine(job, groups)


def run(engine: Any, batches: list[Any]) -> list[Tensor]:
    """Logits of every batch and depth that this process makes, [S, B, V / tp]."""
    found: list[tuple[Any, Tensor]] = []
    for chunk in engine.network.chunks:
        if chunk.module.post_process:
            # What the head is given; it makes logits of it below, behind the pass.
            chunk.module.output_layer.register_forward_pre_hook(
                lambda layer, inputs: found.append((layer, inputs[0]))
            )
    engine.forward_only(engine.objective.turns[0], batches)
    with torch.no_grad():
        return [layer(hidden)[0] for layer, hidden in list(found)]


def gathered(parts: Tensor, group: Any, axis: int) -> Tensor:
    pieces = [torch.empty_like(parts) for _ in range(group.size())]
    dist.all_gather(pieces, parts.contiguous(), group=group)
    return torch.cat(pieces, dim=axis)


def _logits() -> dict[str, np.ndarray]:
    """Logits of the packed rows by layout, [rows, 1 + D, S, V], where this rank makes some."""
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    whole = {}
    for name, parallel in LAYOUTS.items():
        groups = build_groups(parallel, timeout_s=60)
        batches = [
            packed_batch([row], LENGTH).part_of(groups.cp.rank(), groups.cp.size())
            for row in rows()
        ]
        found = run(engine_of(parallel, groups), batches)
        if found:
            logits = gathered(torch.stack(found).squeeze(2), groups.tp, axis=-1)
            logits = in_order(gathered(logits, groups.cp, axis=1), groups.cp.size(), dim=1)
            whole[name] = logits.unflatten(0, (len(batches), -1)).numpy()
        destroy_groups()
    return whole


@pytest.fixture(scope="module")
def logits() -> dict[str, np.ndarray]:
    ranks = run_distributed(_logits, 2)
    return ranks[0] | ranks[1]


@pytest.fixture(scope="module")
def expected() -> list[list[Tensor]]:
    """Logits of every document of every row, alone, on one process, [1 + D, S, V]."""
    with alone() as groups:
        engine = engine_of(Parallel(), groups)
        found = [[torch.stack(run(engine, [alone_in_a_row(d)])) for d in row] for row in rows()]
    return [[logits.squeeze(2) for logits in row] for row in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_has_the_logits_that_it_has_alone(
    layout: str, logits: dict[str, np.ndarray], expected: list[list[Tensor]]
) -> None:
    for row, documents_of_row in enumerate(expected):
        start = 0
        for document in documents_of_row:
            places = document.shape[1]
            for depth in range(1 + DEPTHS):
                counts = max(0, places - depth)
                found = torch.from_numpy(logits[layout][row, depth, start : start + counts])
                torch.testing.assert_close(found, document[depth, :counts])
            start += places
