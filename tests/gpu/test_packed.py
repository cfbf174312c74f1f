"""Packed rows through Transformer Engine and mamba-ssm: documents do not see each other.

Written for a GPU and not yet run on one: the machine of the trunk has none.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from tests.packed import alone_in_a_row, documents, packed_batch
from tests.tiny import MEGATRON_WARNINGS, VOCAB, losses_of, tiny_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    *MEGATRON_WARNINGS,
]
LENGTH, PLACES = 256, [(70, 1, 100), (3, 130, 123)]


@pytest.fixture(scope="module")
def gpu_groups() -> Iterator[Any]:
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.runtime.start import process

    with process(Runtime(device=Device.cuda), seed=1234):
        groups = build_groups(Parallel(), timeout_s=60)
        yield groups
        destroy_groups()


def test_a_token_has_the_losses_that_it_has_alone(gpu_groups: Any) -> None:
    """In bfloat16, whose steps of 2^-8 set the tolerance; a look across would be far beyond it."""
    pytest.importorskip("transformer_engine.pytorch")
    pytest.importorskip("mamba_ssm")
    pytest.importorskip("causal_conv1d")
    from hybrid_train.model.build import build_model

    job = tiny_job("M*M-/*M", precision=Precision(format=GemmFormat.bf16))
    job.runtime = Runtime(device=Device.cuda, kernels=Kernels.fused)
    job.model.attention.head_dim = 64
    job.train.sequence_length = LENGTH
    built = build_model(job, gpu_groups, VOCAB, on_gpu=True)
    model = built.chunks[0].bfloat16().eval()
    rows = [documents(*places, seed=seed) for seed, places in enumerate(PLACES)]
    with torch.no_grad():
        packed = losses_of(model, packed_batch(rows, LENGTH).to("cuda"))[1]
        for row, pieces in enumerate(rows):
            start = 0
            for piece in pieces:
                whole = losses_of(model, alone_in_a_row(piece).to("cuda"))[1]
                places = len(piece) - 1
                for depth in range(2):
                    found = packed[depth, row, start : start + places - depth]
                    expected = whole[depth, 0, : places - depth]
                    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
                start += places
