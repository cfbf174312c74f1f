"""Scales against NumPy's float32, which rounds each operation once, and against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_train.precision.formats import GRIDS
from hybrid_train.precision.quantize import AmaxHistory, factors
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)
from hybrid_train.schema.precision import AmaxChoice

FP8 = [Element.e4m3, Element.e5m2]
ONE = np.float32(1)
LARGEST = np.finfo(np.float32).max


def magnitudes(count: int = 4000) -> Tensor:
    """Largest magnitudes of blocks from 1e-30 to 1e30, and those at which a scale changes."""
    usual = torch.rand(count).add(0.01) * 10 ** torch.randint(-30, 30, (count,)).float()
    edges = torch.ldexp(torch.full((60,), 1.75), torch.arange(-30, 30))
    up, down = (torch.nextafter(edges, torch.full_like(edges, to)) for to in (torch.inf, 0.0))
    return torch.cat([usual, edges, up, down])


@pytest.mark.parametrize("element", FP8)
def test_a_float_scale_is_one_division_and_one_reciprocal(element: Element) -> None:
    amax = magnitudes()
    encode = np.float32(GRIDS[element].largest) / amax.numpy()
    found = factors(amax, Scheme(element, Scale.fp32, Shape.vector, 128))
    np.testing.assert_array_equal(found.encode.numpy(), encode)
    np.testing.assert_array_equal(found.scales.numpy(), ONE / encode)


@pytest.mark.parametrize("element", FP8)
def test_a_delayed_scale_is_one_division_and_one_reciprocal(element: Element) -> None:
    for amax in magnitudes(200):
        found = AmaxHistory(1, AmaxChoice.max).scale(amax.view(1, 1), element)
        assert found.numpy() == ONE / (np.float32(GRIDS[element].largest) / amax.numpy())


@pytest.mark.parametrize("element", FP8)
def test_a_power_of_two_is_the_mantissa_cut_off_a_float_scale(element: Element) -> None:
    amax = magnitudes()
    encode = np.float32(GRIDS[element].largest) / amax.numpy()
    _, exponent = np.frexp(encode)
    found = factors(amax, Scheme(element, Scale.power_of_two, Shape.vector, 128))
    np.testing.assert_array_equal(found.encode.numpy(), np.ldexp(ONE, exponent - 1))
    assert torch.equal(found.encode * found.scales, torch.ones_like(amax))


@pytest.mark.parametrize("element", FP8)
def test_an_mx_scale_of_fp8_is_the_smallest_power_that_holds_the_block(element: Element) -> None:
    amax = magnitudes()
    found = factors(amax, Scheme(element, Scale.e8m0, Shape.vector, 32))
    largest = Fraction(GRIDS[element].largest)
    for value, scale in zip(amax.tolist(), found.scales.tolist(), strict=True):
        assert Fraction(value) <= largest * Fraction(scale) < 2 * Fraction(value)
    assert torch.equal(found.encode * found.scales, torch.ones_like(amax))


def test_an_mx_scale_of_fp4_is_the_largest_power_with_four_within_the_block() -> None:
    amax = magnitudes()
    found = factors(amax, Scheme(Element.e2m1, Scale.e8m0, Shape.vector, 32))
    assert ((4 * found.scales <= amax) & (amax < 8 * found.scales)).all()


def test_mx_scales_end_at_the_ends_of_their_format() -> None:
    for element in Element:
        scheme = Scheme(element, Scale.e8m0, Shape.vector, 32)
        found = factors(torch.tensor([0.0, 1e-45, LARGEST]), scheme)
        assert found.scales[:2].tolist() == [2.0**-127] * 2
        assert found.encode[:2].tolist() == [2.0**127] * 2
        assert 2 * found.scales[2].double() * GRIDS[element].largest * 2 > LARGEST


@pytest.mark.parametrize("element", FP8)
def test_a_block_below_the_smallest_mx_scale_has_that_scale(element: Element) -> None:
    # Up to 2^-127 that scale holds the block; above, the next one does.
    parts = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])
    amax = GRIDS[element].largest * parts * 2.0**-127
    found = factors(amax, Scheme(element, Scale.e8m0, Shape.vector, 32))
    assert (found.scales * 2.0**127).tolist() == [1.0, 1.0, 2.0, 2.0, 4.0]


def test_nvfp4_scales_are_those_of_the_paper_in_float32() -> None:
    # arXiv:2509.25149, appendix B, in the order of Transformer Engine 2.20, core_nvfp4.cuh.
    amax = torch.rand(50, 40).square()
    found = factors(amax, Scheme(Element.e2m1, Scale.e4m3, Shape.vector, 16))
    tensor_encode = np.float32(448 * 6) / amax.amax().numpy()
    wanted = amax.numpy() * (tensor_encode * (ONE / np.float32(6)))
    scales = torch.from_numpy(wanted).clamp_max(448).to(torch.float8_e4m3fn).float().numpy()
    with np.errstate(divide="ignore"):
        encode = np.minimum(ONE / (scales * (ONE / tensor_encode)), LARGEST)
    assert found.tensor_scale is not None
    assert found.tensor_scale.numpy() == ONE / tensor_encode
    np.testing.assert_array_equal(found.scales.numpy(), scales)
    np.testing.assert_array_equal(found.encode.numpy(), encode)


@pytest.mark.parametrize("scale", [Scale.fp32, Scale.power_of_two])
def test_a_scale_beyond_a_float_is_the_largest_of_the_type_of_the_tensor(scale: Scale) -> None:
    tiny = torch.tensor([1e-40])
    scheme = Scheme(Element.e4m3, scale, Shape.vector, 128)
    for dtype in (torch.float32, torch.bfloat16):
        expected = 2.0**127 if scale is Scale.power_of_two else torch.finfo(dtype).max
        assert factors(tiny, scheme, dtype).encode.item() == expected
    # 448 / amax between the largest bfloat16 and the largest float32 is kept.
    between = torch.tensor([448 / 3.395e38])
    kept = factors(between, Scheme(Element.e4m3, Scale.fp32, Shape.vector, 128), torch.bfloat16)
    assert kept.encode.item() > torch.finfo(torch.bfloat16).max


def test_an_empty_tensor_has_no_scales() -> None:
    for scale in Scale:
        found = factors(torch.empty(0, 1, 3, 1), Scheme(Element.e4m3, scale, Shape.vector, 16))
        assert found.scales.shape == (0, 1, 3, 1)
