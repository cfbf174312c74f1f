"""Steps that a CUDA graph replays take the losses and weights of those that launch each kernel.

Written for a GPU and not yet run on one: the machine of the trunk has none.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hybrid_train.schema.gpu import CudaGraphs, Gpu
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from tests.tiny import BATCH, LENGTH, MEGATRON_WARNINGS, VOCAB, microbatches, some_rows, tiny_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    *MEGATRON_WARNINGS,
]
STEPS = 6  # of which the last three are replayed


@pytest.fixture(scope="module")
def gpu_groups() -> Iterator[Any]:
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.runtime.start import process

    with process(Runtime(device=Device.cuda), seed=1234):
        groups = build_groups(Parallel(), timeout_s=60)
        yield groups
        destroy_groups()


def losses_of_steps(groups: Any, graphs: CudaGraphs) -> list[float]:
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model

    job = tiny_job("M*-", precision=Precision(format=GemmFormat.bf16), gpu=Gpu(cuda_graphs=graphs))
    job.runtime = Runtime(device=Device.cuda, kernels=Kernels.fused)
    job.model.attention.head_dim = 64
    built = build_model(job, groups, VOCAB, on_gpu=True)
    engine = build_engine(job, built, groups, torch.device("cuda"))
    assert (engine.network.step_graph is not None) == (graphs is CudaGraphs.step)
    found = []
    for step in range(STEPS):
        mask = torch.ones(BATCH, LENGTH)
        mask[0, step:] = 0
        report = engine.step(microbatches(some_rows(seed=step), 2, mask), tokens_seen=step)
        found += [report.loss, report.grad_norm]
    return found


def test_replayed_steps_are_those_whose_kernels_are_launched(gpu_groups: Any) -> None:
    for library in ("transformer_engine.pytorch", "mamba_ssm", "causal_conv1d"):
        pytest.importorskip(library)
    captured, plain = (
        losses_of_steps(gpu_groups, one) for one in (CudaGraphs.step, CudaGraphs.none)
    )
    assert captured == pytest.approx(plain, rel=2**-6)
