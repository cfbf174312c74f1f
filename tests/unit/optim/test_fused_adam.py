"""The stand-in for FusedAdam against torch.optim.AdamW whose state is rounded after each step."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.optim.fused_adam import FusedAdam
from hybrid_train.precision.formats import join_remainder

SIZES = ((33, 7), (5,))
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
RANGES = {torch.float16: (torch.float16, 65504 / 2), torch.uint8: (torch.float8_e4m3fn, 448.0)}


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round by hand: bfloat16 as it is, others with their largest value at the end of a range."""
    if dtype not in RANGES:
        return values.to(dtype).float()
    stored, limit = RANGES[dtype]
    scale = values.abs().max() / limit
    return (values / scale).clamp(-limit, limit).to(stored).float() * scale


def start(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


def gradients(step: int) -> list[Tensor]:
    """Of sizes that differ by a factor of some 1000 within a tensor."""
    generator = torch.Generator().manual_seed(100 + step)
    drawn = [torch.randn(size, generator=generator) for size in SIZES]
    return [values * 10 ** torch.rand(values.shape, generator=generator) ** 3 for values in drawn]


@dataclasses.dataclass
class Twin:
    """torch.optim.AdamW in float32 on the same weights."""

    weights: list[Tensor]

    def __post_init__(self) -> None:
        self.adam = torch.optim.AdamW(self.weights, **SETTINGS, fused=True)

    def step(self, given: list[Tensor], first: torch.dtype, second: torch.dtype) -> None:
        for weight, gradient in zip(self.weights, given, strict=True):
            weight.grad = gradient
        self.adam.step()
        for weight in self.weights:
            state = self.adam.state[weight]
            state["exp_avg"].copy_(rounded(state["exp_avg"], first))
            state["exp_avg_sq"].copy_(rounded(state["exp_avg_sq"], second))


def ours(weights: list[Tensor], **formats: Any) -> FusedAdam:
    return FusedAdam(weights, **SETTINGS, **formats)


def take(adam: FusedAdam, weights: list[Tensor], step: int, name: str = "grad") -> None:
    for weight, gradient in zip(weights, gradients(step), strict=True):
        setattr(weight, name, gradient)
    adam.step()


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("second", FORMATS, ids="second={}".format)
@pytest.mark.parametrize("first", FORMATS, ids="first={}".format)
def test_steps_are_those_of_adamw_with_moments_rounded_behind_each(
    first: torch.dtype, second: torch.dtype, steps: int
) -> None:
    weights, twin = start(), Twin(start())
    adam = ours(weights, exp_avg_dtype=first, exp_avg_sq_dtype=second)
    for step in range(steps):
        take(adam, weights, step)
        twin.step(gradients(step), first, second)
    for weight, other in zip(weights, twin.weights, strict=True):
        assert torch.equal(weight, other)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(adam.get_unscaled_state(weight, name), twin.adam.state[other][name])


def test_lowered_moments_change_the_steps() -> None:
    weights, twin = start(), Twin(start())
    adam = ours(weights, exp_avg_dtype=torch.uint8)
    for step in range(2):
        take(adam, weights, step)
        twin.step(gradients(step), torch.float32, torch.float32)
    assert not torch.equal(weights[0], twin.weights[0])


@pytest.mark.parametrize("remainders", [True, False], ids="remainders={}".format)
def test_float32_masters_of_bfloat16_weights_are_adamws_weights_to_the_bit(
    remainders: bool,
) -> None:
    weights = start(torch.bfloat16)
    twin = Twin([weight.float() for weight in weights])
    adam = ours(
        weights, master_weights=True, use_decoupled_grad=True, store_param_remainders=remainders
    )
    for step in range(20):
        take(adam, weights, step, "decoupled_grad")
        twin.step(gradients(step), torch.float32, torch.float32)
    for weight, other in zip(weights, twin.weights, strict=True):
        kept = adam.state[weight]["master_param"]
        assert kept.dtype == (torch.int16 if remainders else torch.float32)
        assert torch.equal(join_remainder(weight, kept) if remainders else kept, other)
        spacing = torch.finfo(torch.bfloat16).eps * other.abs()
        assert ((weight.float() - other).abs() <= spacing / 2).all()


def test_float16_masters_are_adamws_weights_rounded_after_each_step() -> None:
    weights = start(torch.bfloat16)
    twin = Twin([rounded(weight.float(), torch.float16) for weight in weights])
    adam = ours(
        weights,
        master_weights=True,
        master_weight_dtype=torch.float16,
        use_decoupled_grad=True,
    )
    for step in range(20):
        take(adam, weights, step, "decoupled_grad")
        twin.step(gradients(step), torch.float32, torch.float32)
        for weight, other in zip(weights, twin.weights, strict=True):
            assert torch.equal(weight, other.bfloat16())  # of the step, before its own rounding
            other.copy_(rounded(other, torch.float16))
            assert torch.equal(adam.get_unscaled_state(weight, "master_param"), other)


def test_gradients_in_bfloat16_count_as_they_are() -> None:
    one, other = start(), start()
    adams = [ours(one, use_decoupled_grad=True), ours(other, use_decoupled_grad=True)]
    for weight, twin, gradient in zip(one, other, gradients(0), strict=True):
        weight.decoupled_grad = gradient.bfloat16()
        twin.decoupled_grad = gradient.bfloat16().float()
    for adam in adams:
        adam.step()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-22, 1e30])
def test_state_of_any_size_is_finite(dtype: torch.dtype, size: float) -> None:
    weights = start()
    adam = ours(weights, exp_avg_dtype=dtype)
    take(adam, weights, 0)
    values = torch.full_like(weights[0], size)
    adam.set_scaled_state(weights[0], "exp_avg", values)
    found = adam.get_unscaled_state(weights[0], "exp_avg")
    torch.testing.assert_close(found, values, rtol=2**-8, atol=0)


def test_parameters_without_gradients_stay() -> None:
    weights = start()
    adam = ours(weights, exp_avg_dtype=torch.bfloat16)
    take(adam, weights, 0)
    before = [weight.clone() for weight in weights]
    adam.zero_grad()
    adam.step()
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_its_state_dictionary_is_unscaled_and_read_by_another_precision() -> None:
    weights, others = start(), start()
    adam, twin = ours(weights, exp_avg_dtype=torch.float16), ours(others)
    for step in range(3):
        take(adam, weights, step)
    twin.load_state_dict(adam.state_dict())
    assert twin.param_groups[0]["step"] == 3
    for weight, other in zip(weights, others, strict=True):
        moment = twin.state[other]["exp_avg"]
        assert moment.dtype == torch.float32
        assert torch.equal(moment, adam.get_unscaled_state(weight, "exp_avg"))
