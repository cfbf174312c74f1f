"""Scores of every element under every layout are those of one process."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.runtime import cpu
from hybrid_train.schema.importance import ExpertMetric, LayerMetric, OverTokens
from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.distributed.test_packed import PATTERN
from tests.scored import (
    frozen_network,
    packed_rows,
    passes_of,
    scores_of,
    settings,
    whole_rows,
)
from tests.tiny import MEGATRON_WARNINGS, alone, tiny_job

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.slow]
OF_TWO = {
    "tensor": Parallel(tensor=2),
    "pipeline": Parallel(pipeline=2),
    "virtual pipeline": Parallel(pipeline=2, virtual_pipeline=2),
    "expert": Parallel(expert=2),
    "context": Parallel(context=2),
    "data": Parallel(),
    "experts whole": Parallel(tensor=2, expert_tensor=1, expert=2),
}
OF_FOUR = {
    "tensor x pipeline": Parallel(tensor=2, pipeline=2),
    "tensor x context": Parallel(tensor=2, context=2),
    "context x expert": Parallel(context=2, expert=2),
    "pipeline x data": Parallel(pipeline=2),
}
ROWS = 5  # no multiple of two data-parallel ranks
METRICS = [one for one in LayerMetric if one not in (LayerMetric.cosine, LayerMetric.accuracy)]
ROUNDING = 2e-5  # of the largest score of a name: float32 activations, sums of another order


def _cut(parallel: Parallel) -> str:
    stages = PATTERN.split("|")
    parts = parallel.pipeline * parallel.virtual_pipeline
    cuts = {1: "".join(stages), 2: "|".join(["".join(stages[:2]), "".join(stages[2:])])}
    return cuts.get(parts, PATTERN)


def _scores(layouts: dict[str, Parallel]) -> dict[str, dict[str, Tensor]]:
    """All scores of each layout, of whole and of packed rows."""
    cpu.install()
    from hybrid_train.compression.removal import LayerRemoval
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    found = {}
    for name, parallel in layouts.items():
        groups = build_groups(parallel, timeout_s=60)
        job: Any = tiny_job(_cut(parallel), parallel=parallel)
        network = frozen_network(job, groups)
        scores = {}
        for kind, rows in (("whole", whole_rows(ROWS)), ("packed", packed_rows(ROWS))):
            for metric, over in (
                (ExpertMetric.output, OverTokens.mean),
                (ExpertMetric.without, OverTokens.variance),
            ):
                asked = settings(experts=metric, over_tokens=over)
                made = scores_of(network, job.model, rows, asked)
                scores |= {f"{kind} {over.value} {one}": made[one] for one in made}
            removal = LayerRemoval(passes_of(network, rows), job.model, ROWS)
            made = removal.scores(METRICS, iterative=0, blocks=[2])
            scores |= {f"{kind} {one}": made[one] for one in made}
        found[name] = scores
        destroy_groups()
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    with alone():
        from hybrid_train.megatron.data_parallel import destroy_groups

        destroy_groups()
        return _scores({"one": Parallel()})["one"]


@pytest.fixture(scope="module")
def two() -> list[dict[str, dict[str, Tensor]]]:
    return run_distributed(_scores, 2, OF_TWO)


@pytest.fixture(scope="module")
def four() -> list[dict[str, dict[str, Tensor]]]:
    return run_distributed(_scores, 4, OF_FOUR)


@pytest.mark.parametrize("layout", [*OF_TWO, *OF_FOUR])
def test_every_rank_has_the_scores_of_one_process(
    layout: str, expected: dict[str, Tensor], request: pytest.FixtureRequest
) -> None:
    ranks = request.getfixturevalue("two" if layout in OF_TWO else "four")
    first, *others = (rank[layout] for rank in ranks)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert list(first) == list(expected)
    largest = 0.0
    for name, wanted in expected.items():
        measured = wanted < torch.finfo(torch.float32).max
        apart = (first[name] - wanted)[measured].abs().max() / wanted[measured].abs().max()
        assert apart < ROUNDING, f"{name}: {apart:.2g}"
        largest = max(largest, float(apart))
    print(f"{layout}: {len(expected)} sets of scores, largest difference {largest:.2g}")
