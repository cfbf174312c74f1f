"""Under every layout a planted element is found on each axis, and all scores are one process's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis
from hybrid_train.runtime import cpu
from hybrid_train.schema.importance import ExpertMetric, LayerMetric, OverTokens
from hybrid_train.schema.parallel import Parallel
from tests.distilled import write_teacher
from tests.distributed.launch import run_distributed
from tests.scored import (
    PLANTED,
    packed_rows,
    passes_of,
    plant,
    planted,
    scores_of,
    settings,
    whole_rows,
)
from tests.tiny import MEGATRON_WARNINGS, RUNTIME, alone, tiny_job

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
PATTERN = "MEM*M-E*/*ME/*ME"
ROWS = 5  # no multiple of two data-parallel ranks
METRICS = [one for one in LayerMetric if one not in (LayerMetric.cosine, LayerMetric.accuracy)]
# Of the largest score of a name: float32 activations, sums of another order. Weights that nobody
# planted differ by 1e-6; a softmax whose logits are a hundred times as large makes more of it.
ROUNDING = 1e-4
# An expert that is not there changes what others get; a variance is of values whose mean counts.
ASKED = (
    settings(),
    settings(experts=ExpertMetric.without, over_tokens=OverTokens.variance),
)


def _scores(layouts: dict[str, Parallel], run: Path) -> dict[str, dict[str, Tensor]]:
    """All scores of each layout, of whole and of packed rows."""
    cpu.install()
    from hybrid_train.compression.removal import LayerRemoval
    from hybrid_train.jobs.networks import load_model
    from hybrid_train.megatron.data_parallel import destroy_groups

    found = {}
    for name, parallel in layouts.items():
        loaded = load_model(str(run), RUNTIME, parallel=parallel)
        network, model = loaded.network, loaded.job.model
        scores = {}
        for kind, rows in (("whole", whole_rows(ROWS)), ("packed", packed_rows(ROWS))):
            for number, asked in enumerate(ASKED):
                made = scores_of(network, model, rows, asked)
                scores |= {f"{kind} {number} {one}": made[one] for one in made}
            removal = LayerRemoval(passes_of(network, rows), model, ROWS)
            made = removal.scores(METRICS, iterative=0, blocks=[2])
            scores |= {f"{kind} 0 {one}": made[one] for one in made}
        found[name] = scores
        destroy_groups()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first weights have one element of each axis planted."""
    folder = tmp_path_factory.mktemp("importance") / "run"
    with alone() as groups:
        return write_teacher(folder, groups, change=plant, pattern=PATTERN)


@pytest.fixture(scope="module")
def expected(run: Path) -> dict[str, Tensor]:
    with alone():
        from hybrid_train.megatron.data_parallel import destroy_groups

        destroy_groups()
        return _scores({"one": Parallel()}, run)["one"]


@pytest.fixture(scope="module")
def two(run: Path) -> list[dict[str, dict[str, Tensor]]]:
    return run_distributed(_scores, 2, OF_TWO, run)


@pytest.fixture(scope="module")
def four(run: Path) -> list[dict[str, dict[str, Tensor]]]:
    return run_distributed(_scores, 4, OF_FOUR, run)


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


@pytest.mark.parametrize("layout", [*OF_TWO, *OF_FOUR])
def test_the_planted_element_of_each_axis_is_found(
    layout: str, request: pytest.FixtureRequest
) -> None:
    scores = request.getfixturevalue("two" if layout in OF_TWO else "four")[0][layout]
    found = set()
    for start in (f"{kind} {number} " for kind in ("whole", "packed") for number in range(2)):
        of_kind = {n.removeprefix(start): one for n, one in scores.items() if n.startswith(start)}
        for axis, element, values in planted(tiny_job(PATTERN).model, of_kind):
            # What is large need not vary; the second set is of experts that are not there.
            if axis is Axis.experts or "0" in start:
                assert int(values.argmax()) == element, (start, axis)
                found.add(axis)
    assert found == {*PLANTED, "layers"}
