"""Gradients are kept and reduced in the format that the precision section names."""

from typing import Any

import pytest
import torch

from hybrid_train.config.schema.precision import Precision, ProductFormat
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS


@pytest.mark.parametrize(
    ("in_fp32", "kept_in"), [(True, torch.float32), (False, torch.bfloat16)], ids=str
)
def test_gradients_of_bf16_weights_are_reduced_in_the_asked_format(
    groups: Any, in_fp32: bool, kept_in: torch.dtype
) -> None:
    precision = Precision(format=ProductFormat.bf16, reduce_gradients_in_fp32=in_fp32)
    engine = tiny_engine(tiny_job(precision=precision), groups)
    batches = microbatches(some_rows(), 2)
    losses = [engine.step(batches, tokens_seen=0).loss for _ in range(8)]
    (wrapped,) = engine.chunks
    assert wrapped.ddp_config.grad_reduce_in_fp32 is in_fp32
    halves = [w for w in wrapped.parameters() if w.dtype == torch.bfloat16]
    assert halves
    assert {w.main_grad.dtype for w in halves} == {kept_in}
    assert losses[-1] < losses[0] - 0.05  # the same four sequences eight times: it must learn them
