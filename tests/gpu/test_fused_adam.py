"""Our stand-in for FusedAdam against Transformer Engine's.

Written for a GPU and not yet run on one: the machine of the trunk has none.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.optim.fused_adam import MASTER, MOMENTS, FusedAdam
from hybrid_train.precision.formats import join_remainder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 20
SPACING = {
    torch.float32: 2**-23,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
    torch.uint8: 2**-3,
}


def theirs_class() -> Any:
    """Return the class that core takes where Transformer Engine is installed."""
    pytest.importorskip("transformer_engine.pytorch")
    from megatron.core.optimizer import Adam

    return Adam


def start(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in ((129, 65), (7,))]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=generator) for size in ((129, 65), (7,))]


def run(kind: Any, device: str, dtype: torch.dtype, **formats: Any) -> tuple[Any, list[Tensor]]:
    weights = [weight.to(device) for weight in start(dtype)]
    adam = kind(weights, **SETTINGS, **formats)
    for step in range(STEPS):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            name = "decoupled_grad" if formats.get("use_decoupled_grad") else "grad"
            setattr(weight, name, gradient.to(device))
        adam.step()
    return adam, weights


def both(dtype: torch.dtype, **formats: Any) -> Any:
    """Yield, weight by weight, what each of the two optimizers has."""
    ours, our_weights = run(FusedAdam, "cpu", dtype, **formats)
    theirs, their_weights = run(theirs_class(), "cuda", dtype, **formats)
    assert ours.param_groups[0]["step"] == theirs.param_groups[0]["step"] == STEPS
    for one, other in zip(our_weights, their_weights, strict=True):
        assert set(ours.state[one]) == set(theirs.state[other])
        yield ours, one, theirs, other


def near(one: Tensor, other: Tensor, spacings: float) -> None:
    """Compare by the largest value, of which each step may round the last digit another way."""
    other = other.detach().float().cpu()
    limit = spacings * float(other.abs().max())
    torch.testing.assert_close(one.detach().float(), other, rtol=0, atol=limit)


@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_weights_and_moments_are_transformer_engines(
    first: torch.dtype, second: torch.dtype
) -> None:
    formats = {"exp_avg_dtype": first, "exp_avg_sq_dtype": second}
    for ours, one, theirs, other in both(torch.float32, **formats):
        for name, dtype in zip(MOMENTS, (first, second), strict=True):
            found = theirs.get_unscaled_state(other, name)
            near(ours.get_unscaled_state(one, name), found, 2 * SPACING[dtype])
        # Updates are at most the rate times 1 / sqrt(1 - beta2), off by a spacing of a moment.
        rounding = SPACING[first] + SPACING[second] / 2
        off = STEPS * SETTINGS["lr"] / 0.05**0.5 * rounding + 64 * SPACING[torch.float32]
        torch.testing.assert_close(one, other.cpu(), rtol=0, atol=off)


@pytest.mark.parametrize("remainders", [True, False])
def test_float32_masters_are_transformer_engines(remainders: bool) -> None:
    formats = {"master_weights": True, "use_decoupled_grad": True}
    for ours, one, theirs, other in both(
        torch.bfloat16, store_param_remainders=remainders, **formats
    ):
        kept, found = ours.state[one][MASTER], theirs.state[other][MASTER].cpu()
        assert kept.dtype == found.dtype
        if remainders:
            kept, found = join_remainder(one, kept), join_remainder(other.detach().cpu(), found)
        near(kept, found, 64 * SPACING[torch.float32])


def test_float16_masters_are_transformer_engines() -> None:
    formats = {"master_weights": True, "use_decoupled_grad": True}
    for ours, one, theirs, other in both(
        torch.bfloat16, master_weight_dtype=torch.float16, **formats
    ):
        found = theirs.get_unscaled_state(other, MASTER)
        near(ours.get_unscaled_state(one, MASTER), found, STEPS * SPACING[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_a_tensor_without_gradients_keeps_moments_of_zero(dtype: torch.dtype) -> None:
    """Transformer Engine divides by a scale of zero in FP8: this says whether it matters."""
    weight = torch.ones(64, device="cuda")
    adam = theirs_class()([weight], **SETTINGS, exp_avg_dtype=dtype)
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        adam.step()
    assert (adam.get_unscaled_state(weight, "exp_avg") == 0).all()
