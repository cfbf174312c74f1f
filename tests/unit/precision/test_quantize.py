"""Properties of quantized matrices that no other implementation is needed for."""

import pytest
import torch

from hybrid_train.precision.formats import UNIT, Noise, round_to
from hybrid_train.precision.operands import quantize_dequantize
from hybrid_train.precision.quantize import quantize
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)
from tests.unit.precision.matrices import KINDS, SCHEMES, same, wide

PLAIN = [one for one in SCHEMES if not one.stochastic and not one.hadamard]
SAME_BOTH_WAYS = [one for one in PLAIN if one.shape is not Shape.vector]
POWERS = [one for one in PLAIN if one.scale in (Scale.power_of_two, Scale.e8m0)]
FINITE = [name for name in KINDS if name != "broken"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SAME_BOTH_WAYS, ids=str)
def test_squares_and_tensors_commute_with_the_transpose(scheme: Scheme, kind: str) -> None:
    x = KINDS[kind](150, 70, torch.Generator().manual_seed(0))
    one = quantize(x, scheme, 1).dequantize()
    assert same(quantize(x.t().contiguous(), scheme, 0).dequantize().t(), one)
    assert same(quantize(x, scheme, 0).dequantize(), one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", PLAIN, ids=str)
def test_an_axis_is_the_other_of_the_transpose(scheme: Scheme, kind: str) -> None:
    x = KINDS[kind](150, 70, torch.Generator().manual_seed(0))
    found = quantize(x.t().contiguous(), scheme, 1).dequantize().t()
    assert same(quantize(x, scheme, 0).dequantize(), found)


@pytest.mark.parametrize("kind", ["wide", "ties"])
@pytest.mark.parametrize("scheme", POWERS, ids=str)
def test_quantizing_twice_changes_nothing(scheme: Scheme, kind: str) -> None:
    x = KINDS[kind](160, 256, torch.Generator().manual_seed(0))
    once = quantize(x, scheme, 1).dequantize()
    assert torch.equal(quantize(once, scheme, 1).dequantize(), once)


@pytest.mark.parametrize("kind", FINITE)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_elements_are_on_the_grid_and_sizes_stay(scheme: Scheme, kind: str) -> None:
    x = KINDS[kind](48, 80, torch.Generator().manual_seed(0))
    noise = Noise().draw(x) if scheme.stochastic else None
    found = quantize(x, scheme, 1, noise=noise)
    assert found.dequantize().shape == x.shape
    if found.elements.isfinite().all():  # turning may leave the range of float32
        assert torch.equal(round_to(found.elements, scheme.element), found.elements)


@pytest.mark.parametrize("scheme", PLAIN, ids=str)
def test_the_values_that_fill_a_block_change_nothing(scheme: Scheme) -> None:
    x = wide(37, 53, torch.Generator().manual_seed(0))
    filled = torch.zeros(128, 128)
    filled[:37, :53] = x
    for axis in (0, 1):
        expected = quantize(filled, scheme, axis).dequantize()[:37, :53]
        assert torch.equal(quantize(x, scheme, axis).dequantize(), expected)


@pytest.mark.parametrize("scheme", PLAIN, ids=str)
def test_a_block_with_an_infinity_or_nan_becomes_nan_and_no_other(scheme: Scheme) -> None:
    whole_tensor = scheme.shape is Shape.tensor or scheme.scale is Scale.e4m3
    for value in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(256, 256)
        x[5, 7] = value
        broken = quantize(x, scheme, 1).dequantize().isnan()
        height = scheme.block if scheme.shape is Shape.square else 1
        expected = torch.zeros(256, 256, dtype=torch.bool)
        first = 5 // height * height
        expected[first : first + height, : scheme.block] = True
        assert broken.all() if whole_tensor else torch.equal(broken, expected)


@pytest.mark.parametrize("scheme", PLAIN, ids=str)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    x = torch.zeros(40, 40)
    assert not quantize(x, scheme, 1).dequantize().any()
    x[0, 0] = 3.0
    assert quantize(x, scheme, 1).dequantize().count_nonzero() == 1


def test_the_error_of_a_matrix_rounded_stochastically_has_a_mean_of_zero() -> None:
    scheme = Scheme(Element.e2m1, Scale.e4m3, Shape.vector, 16, stochastic=True)
    x, noise, draws = torch.randn(32, 64), Noise(), 4000
    mean = torch.zeros(32, 64, dtype=torch.float64)
    for _ in range(draws):
        mean += quantize_dequantize(x, scheme, 1, noise=noise.draw(x)) / draws
    found = quantize(x, scheme, 1, noise=noise.draw(x))
    encoded = (x / (found.scales.repeat_interleave(16, 1) * found.tensor_scale)).abs()
    step = (x / encoded).abs() * torch.where(encoded < 2, 0.5, torch.where(encoded < 4, 1.0, 2.0))
    # Hoeffding over 2048 values with a chance of 1e-9 in all; what an E4M3 scale cuts is no chance.
    bound = (torch.tensor(2 * 2048 / 1e-9).log() / (2 * draws)).sqrt() + 2.0**-15
    within = encoded < 6
    assert within.float().mean() > 0.95
    assert ((mean - x).abs() <= bound * step)[within].all()


def test_noise_moves_a_value_by_less_than_a_step() -> None:
    scheme = Scheme(Element.e2m1, Scale.e8m0, Shape.vector, 32, stochastic=True)
    x = torch.tensor([[4.0, *[2.5] * 31]])
    numbers = torch.full((1, 32), 1, dtype=torch.int16)
    assert quantize(x, scheme, 1, noise=numbers).dequantize()[0, 1] == 3.0
    assert quantize(x, scheme, 1, noise=-numbers).dequantize()[0, 1] == 2.0
    assert UNIT == 2.0**-16
