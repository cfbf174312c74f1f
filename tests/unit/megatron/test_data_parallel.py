"""Gradients are kept and reduced in the format that the precision section names."""

from typing import Any

import pytest
import torch

from hybrid_train.schema.precision import GemmFormat, Precision
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS


@pytest.mark.parametrize(
    ("in_fp32", "kept_in"),
    sampled([(True, torch.float32), (False, torch.bfloat16)], (False, torch.bfloat16)),
    ids=str,
)
def test_gradients_of_bf16_weights_are_reduced_in_the_asked_format(
    groups: Any, in_fp32: bool, kept_in: torch.dtype
) -> None:
    precision = Precision(format=GemmFormat.bf16, reduce_gradients_in_fp32=in_fp32)
    engine = tiny_engine(tiny_job(precision=precision), groups)
    batches = microbatches(some_rows(), 2)
    losses = [engine.step(batches, tokens_seen=0).loss for _ in range(8)]
    (wrapped,) = engine.network.chunks
    assert wrapped.ddp_config.grad_reduce_in_fp32 is in_fp32
    halves = [w for w in wrapped.parameters() if w.dtype == torch.bfloat16]
    assert halves
    assert {w.main_grad.dtype for w in halves} == {kept_in}
    assert losses[-1] < losses[0] - 0.05  # the same four sequences eight times: it must learn them


def test_decay_rates_and_counts_stay_in_float32(groups: Any) -> None:
    engine = tiny_engine(tiny_job(precision=Precision(format=GemmFormat.bf16)), groups)
    (wrapped,) = engine.network.chunks
    kept = {
        name.rpartition(".")[2]
        for name, tensor in (*wrapped.named_parameters(), *wrapped.named_buffers())
        if tensor.dtype == torch.float32
    }
    assert kept == {"A_log", "D", "dt_bias", "local_tokens_per_expert", "expert_bias"}


def test_their_first_values_are_not_rounded(groups: Any) -> None:
    half, full = (
        tiny_engine(tiny_job(precision=Precision(format=format)), groups)
        for format in (GemmFormat.bf16, GemmFormat.fp32)
    )
    precise = dict(full.network.chunks[0].module.named_parameters())
    for name, weight in half.network.chunks[0].module.module.named_parameters():
        if weight.dtype == torch.float32:
            assert torch.equal(weight, precise[name])


def test_a_bf16_model_counts_the_tokens_of_experts_beyond_256(groups: Any) -> None:
    # bfloat16 has 8 digits: 256 + 1 is 256 there, and 1,000 + 9 is 1,008.
    job = tiny_job("E", precision=Precision(format=GemmFormat.bf16))
    engine = tiny_engine(job, groups)
    sequences = 160
    engine.step(microbatches(some_rows(), 2), tokens_seen=0, sequences=sequences)
    (counts,) = engine.network.finalizer.expert_counts.values()
    assert counts.max() > 256
    assert counts.sum() == sequences * job.train.sequence_length * job.model.moe.top_k
    assert torch.equal(counts, counts.round())
