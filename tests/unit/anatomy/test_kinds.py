"""The tables of parameters against the models that Megatron builds; the order of packed rows."""

from typing import Any

import pytest

from hybrid_train.anatomy.axes import sizes_of
from hybrid_train.anatomy.kinds import EMBEDDING, HEAD, AttentionKind, MambaKind, Parameter
from hybrid_train.anatomy.layers import block_prefix, layers, mtp_blocks
from hybrid_train.planning.degrees import expert_tensor
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.train import TrainJob
from tests.pruned import FINAL_NORM, MTP_BLOCK
from tests.tiny import EVERY_KIND, MEGATRON_WARNINGS, tiny_job
from tests.unit.config.test_core_accepts import first_chunk

pytestmark = MEGATRON_WARNINGS
ROWS = 64  # of the embedding, padded


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> None:
    """Send what asks for CUDA to the CPU, for the rest of this process."""
    from hybrid_train.runtime import cpu

    cpu.install()


def built(job: TrainJob, processes: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the first process."""
    parameters = first_chunk(job, processes).named_parameters()
    return {name: tuple(weight.shape) for name, weight in parameters}


def listed(job: TrainJob) -> dict[str, tuple[int, ...]]:
    """The same, as the tables have it."""
    found = {}
    plan = job.parallel

    def add(prefix: str, one: Parameter, sizes: Any) -> None:
        if one.buffer:
            return
        shape = list(one.shape(sizes))
        if one.split is not None:
            shape[one.split] //= expert_tensor(plan) if one.of_experts else plan.tensor
        held = sizes.experts // plan.expert if one.of_experts else 1
        for expert in range(held):
            found[f"{prefix}{one.name}{expert if one.of_experts else ''}"] = tuple(shape)

    for layer in layers(job.model):
        for one in layer.parameters:
            add(layer.prefix, one, layer.sizes)
    sizes = sizes_of(job.model, ROWS)
    for one in (EMBEDDING, FINAL_NORM, HEAD):
        add("", one, sizes)
    for depth in range(1, mtp_blocks(job.model) + 1):
        for one in MTP_BLOCK:
            add(block_prefix(depth), one, sizes)
    return found


LAYOUTS = [
    (Parallel(), 1),
    (Parallel(tensor=2), 2),
    (Parallel(tensor=2, expert_tensor=1, expert=2), 2),
]


@pytest.mark.parametrize(("parallel", "processes"), LAYOUTS)
def test_the_tables_list_every_parameter_with_the_shape_that_it_is_built_with(
    parallel: Parallel, processes: int
) -> None:
    job = tiny_job(EVERY_KIND, parallel=parallel)
    assert listed(job) == built(job, processes)


def test_experts_without_latent_projections_work_in_the_hidden_width() -> None:
    job = tiny_job("E/E/E")
    job.model.moe.latent_size = job.model.moe.shared_intermediate_size = None
    job.model.mtp.repeated_block = False
    assert listed(job) == built(job, 1)


def test_rows_of_a_key_value_group_are_its_queries_then_its_key_then_its_value() -> None:
    sizes = sizes_of(tiny_job("*").model)  # 4 heads of 8 in 2 groups
    runs = [(part.name, run, rows) for part, run, rows in AttentionKind.packed.runs(sizes)]
    assert runs == [("q", 0, 16), ("k", 0, 8), ("v", 0, 8), ("q", 1, 16), ("k", 1, 8), ("v", 1, 8)]


def test_rows_of_in_proj_are_its_parts_one_behind_the_other() -> None:
    sizes = sizes_of(tiny_job("M").model)  # 4 heads of 16, 2 groups of 8 states
    runs = [(part.name, rows) for part, _, rows in MambaKind.packed.runs(sizes)]
    assert runs == [("z", 64), ("x", 64), ("B", 16), ("C", 16), ("dt", 4)]
