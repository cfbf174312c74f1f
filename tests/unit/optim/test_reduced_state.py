"""State in fewer bits by Megatron's own path for it: what it keeps, and how training goes."""

from typing import Any

import pytest
import torch

from hybrid_train.optim.fused_adam import FusedAdam
from hybrid_train.planning.memory import Held, memory
from hybrid_train.schema.optimizer import (
    AdamW,
    GradientFormat,
    MasterFormat,
    MomentFormat,
)
from hybrid_train.schema.precision import GemmFormat, Precision
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
STEPS = 20
HALF_A_SPACING = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11, "float8": 2**-4}
MOMENTS = sampled(
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("float8", "float16")],
    ("bfloat16", "bfloat16"),
)


def job_of(precision: Precision, **formats: Any) -> Any:
    job = tiny_job(precision=precision)
    job.optimizer = AdamW(**formats)
    return job


def moments(first: str, second: str) -> dict[str, MomentFormat]:
    return {"first_moment": MomentFormat(first), "second_moment": MomentFormat(second)}


def losses(engine: Any, steps: int = STEPS) -> list[float]:
    batches = microbatches(some_rows(), 2)
    return [engine.step(batches, tokens_seen=0).loss for _ in range(steps)]


def adam_of(engine: Any) -> FusedAdam:
    (part,) = engine.network.optimizer.chained_optimizers
    assert isinstance(part.optimizer, FusedAdam)
    return part.optimizer


def tolerance(adamw: AdamW, drop: float) -> float:
    """Bound what the rounding of moments does to a loss that fell by `drop`.

    To first order a loss falls by gradient times update, so updates that are off by a share d
    change that by d of it. A moment holds the roundings u of all steps before, each faded by beta:
    a random walk of u / sqrt(1 - beta^2); the second enters by its root, with a half.
    """
    first = HALF_A_SPACING[adamw.first_moment.value] / (1 - adamw.beta1**2) ** 0.5
    second = HALF_A_SPACING[adamw.second_moment.value] / (1 - adamw.beta2**2) ** 0.5
    return (first + second / 2) * drop


@pytest.fixture(scope="module")
def whole(groups: Any) -> list[float]:
    """Losses with moments in float32."""
    return losses(tiny_engine(job_of(Precision(format=GemmFormat.fp32)), groups))


@pytest.mark.parametrize(("first", "second"), MOMENTS)
def test_the_loss_falls_as_with_moments_in_float32(
    groups: Any, whole: list[float], first: str, second: str
) -> None:
    precision, expected = Precision(format=GemmFormat.fp32), whole
    job = job_of(precision, **moments(first, second))
    found = losses(tiny_engine(job, groups))
    assert expected[0] - expected[-1] > 2
    assert found != expected
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other) <= tolerance(job.optimizer, expected[0] - other)


def test_a_bfloat16_run_keeps_what_the_plan_says(groups: Any) -> None:
    precision = Precision(format=GemmFormat.bf16, reduce_gradients_in_fp32=False)
    for formats in (
        moments("bfloat16", "float16"),
        moments("float8", "float32"),
        {"master_weights": MasterFormat.float16},
    ):
        job = job_of(precision, main_gradients=GradientFormat.bfloat16, **formats)
        engine = tiny_engine(job, groups)
        losses(engine, 1)
        numel = sum(p.numel() for p in engine.network.chunks[0].parameters())
        # Decay rates stay in float32: no master beside them, two more bytes of gradient.
        precise = sum(
            p.numel() for p in engine.network.chunks[0].parameters() if p.dtype == torch.float32
        )
        assert 0 < precise < numel / 1000
        kept = [value for state in adam_of(engine).state.values() for value in state.values()]
        planned = memory(job, Held(numel), processes=1)
        assert sum(value.nbytes for value in kept) == planned.optimizer - 2 * precise
        gradients = [p.decoupled_grad for p in adam_of(engine).state]
        assert sum(gradient.nbytes for gradient in gradients) == planned.gradients + 2 * precise


def test_float32_weights_have_no_masters_beside_them(groups: Any) -> None:
    job = job_of(Precision(format=GemmFormat.fp32), **moments("bfloat16", "bfloat16"))
    engine = tiny_engine(job, groups)
    losses(engine, 1)
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in adam_of(engine).state.values())


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32(groups: Any) -> None:
    precision = Precision(format=GemmFormat.bf16, reduce_gradients_in_fp32=False)
    job = job_of(precision, main_gradients=GradientFormat.bfloat16, clip_grad_norm=1e9)
    engine = tiny_engine(job, groups)
    report = engine.step(microbatches(some_rows(), 2), tokens_seen=0)
    squares = [p.main_grad.double().square().sum() for p in engine.network.chunks[0].parameters()]
    assert report.grad_norm == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("masters", ["float32", "float16"])
def test_the_first_step_of_a_bfloat16_run_is_that_of_whole_state(groups: Any, masters: str) -> None:
    """Nothing is rounded before it: the weights are equal but for ties of their rounding."""
    precision = Precision(format=GemmFormat.bf16)
    whole = tiny_engine(job_of(precision), groups)
    job = job_of(precision, **moments("bfloat16", "float16"), master_weights=MasterFormat(masters))
    reduced_state = tiny_engine(job, groups)
    assert losses(whole, 1) == losses(reduced_state, 1)
    weights = dict(reduced_state.network.chunks[0].named_parameters())
    differ = sum(
        int((weight != weights[name]).sum())
        for name, weight in whole.network.chunks[0].named_parameters()
    )
    # A master in float16 begins as the weight rounded, which has 3 bits less.
    assert differ <= (2 if masters == "float32" else 0.1 * sum(w.numel() for w in weights.values()))


def test_reloaded_weights_are_the_masters_of_the_next_step(groups: Any) -> None:
    precision = Precision(format=GemmFormat.bf16)
    job = job_of(precision, **moments("bfloat16", "bfloat16"))
    trained, fresh = tiny_engine(job, groups), tiny_engine(job, groups)
    begun = [p.detach().clone() for p in trained.network.chunks[0].parameters()]
    losses(trained, 2)
    for parameter, weight in zip(trained.network.chunks[0].parameters(), begun, strict=True):
        parameter.data.copy_(weight)
    for module in (trained, fresh):
        module.network.optimizer.reload_model_params()
    for part in trained.network.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["step"] = 0
    biases = [b for n, b in trained.network.chunks[0].named_buffers() if n.endswith("expert_bias")]
    others = [b for n, b in fresh.network.chunks[0].named_buffers() if n.endswith("expert_bias")]
    for bias, other in zip(biases, others, strict=True):
        bias.copy_(other)
    assert losses(trained, 3) == losses(fresh, 3)


def test_core_finds_the_stand_in_only_while_lowered_state_is_built(groups: Any) -> None:
    import sys

    from megatron.core import optimizer as core

    before = (core.Adam, core.USING_PYTORCH_OPTIMIZER, core.is_te_min_version)
    job = job_of(Precision(format=GemmFormat.fp32), **moments("float16", "float16"))
    tiny_engine(job, groups)
    assert (core.Adam, core.USING_PYTORCH_OPTIMIZER, core.is_te_min_version) == before
    assert "transformer_engine" not in sys.modules
    engine = tiny_engine(job_of(Precision(format=GemmFormat.fp32)), groups)
    (part,) = engine.network.optimizer.chained_optimizers
    assert isinstance(part.optimizer, torch.optim.AdamW)
