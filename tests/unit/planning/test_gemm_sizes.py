"""The sizes that checks compute are those of the matrices that Megatron builds."""

import pytest

from hybrid_train.anatomy.axes import sizes_of
from hybrid_train.planning.gemm_sizes import token_sizes, weight_sizes
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.train import TrainJob
from tests.tiny import EVERY_KIND, MEGATRON_WARNINGS, tiny_job
from tests.unit.config.test_core_accepts import first_chunk

pytestmark = MEGATRON_WARNINGS


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> None:
    """Send what asks for CUDA to the CPU, for the rest of this process."""
    from hybrid_train.runtime import cpu

    cpu.install()


def built(job: TrainJob, processes: int) -> dict[str, tuple[int, ...]]:
    """The shape of the weight of every kind of linear layer on the first process, [O, I]."""
    from hybrid_train.megatron.plain import linear_modules

    shapes = {}
    for linear, module in linear_modules(first_chunk(job, processes)):
        weight = getattr(module, "weight", None)
        shapes[linear.module] = tuple((module.weight0 if weight is None else weight).shape)
    return shapes


LAYOUTS = [
    (Parallel(), 1),
    (Parallel(tensor=2), 2),
    (Parallel(tensor=2, expert_tensor=1, expert=2), 2),
    (Parallel(tensor=1, expert_tensor=2), 2),
]


@pytest.mark.parametrize(("parallel", "processes"), LAYOUTS)
@pytest.mark.parametrize("latent", [True, False])
def test_weights_have_the_computed_sizes(parallel: Parallel, processes: int, latent: bool) -> None:
    job = tiny_job(EVERY_KIND, parallel=parallel)
    if not latent:
        job.model.moe.latent_size = None
    for module, (rows, columns) in built(job, processes).items():
        assert [size.value for size in weight_sizes(job, module, sizes_of(job.model))] == [
            columns,
            rows,
        ], module


def test_a_size_grows_with_the_setting_that_it_names() -> None:
    job = tiny_job(EVERY_KIND)
    modules = ("mamba.in_proj", "attention.qkv", "moe.experts.fc1", "moe.shared.fc2", "mtp.eh_proj")
    for module in modules:
        for number, size in enumerate(weight_sizes(job, module, sizes_of(job.model))):
            *sections, name = size.setting.split(".")
            section = job
            for part in sections:
                section = getattr(section, part)
            before = getattr(section, name)
            setattr(section, name, 2 * before)
            assert weight_sizes(job, module, sizes_of(job.model))[number].value > size.value
            setattr(section, name, before)


def test_tokens_are_split_over_context_and_gathered_over_tensor_ranks() -> None:
    job = tiny_job("ME*", parallel=Parallel(tensor=2, context=2))
    job.train.sequence_length, job.train.microbatch = 16, 3
    assert [size.value for size in token_sizes(job, "mamba.in_proj")] == [24]
    assert [size.value for size in token_sizes(job, "moe.latent.down")] == [12]
