"""The fast path against the readable one, and what is counted against closed forms."""

import pytest
import torch

from hybrid_train.precision import operands
from hybrid_train.precision.formats import Noise
from hybrid_train.precision.operands import OperandStatistics, quantize_dequantize
from hybrid_train.precision.quantize import quantize
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)
from tests.unit.precision.matrices import KINDS, SCHEMES, same

# One value, less than a block, no multiple of one, several chunks along either side.
SIZES = [(1, 1), (37, 53), (64, 96), (129, 5), (40, 300), (0, 16), (16, 0)]
TENSORWISE = Scheme(Element.e4m3, Scale.fp32, Shape.tensor)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut matrices of these sizes into many chunks; the sizes of training take minutes here."""
    monkeypatch.setattr(operands, "_CHUNK", 2000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.usefixtures("small_pieces")
def test_the_fast_path_has_the_values_of_the_reference(scheme: Scheme, kind: str) -> None:
    generator, noise = torch.Generator().manual_seed(0), Noise()
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            for axis in (0, 1):
                x = KINDS[kind](*size, generator).to(dtype) if min(size) else torch.empty(size)
                drawn = noise.draw(x) if scheme.stochastic else None
                expected = quantize(x, scheme, axis, noise=drawn).dequantize()
                found = quantize_dequantize(x, scheme, axis, noise=drawn)
                assert same(found, expected), (size, dtype, axis)


@pytest.mark.parametrize("size", [(700, 500)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_pieces_of_training_give_the_values_of_the_reference(
    scheme: Scheme, size: tuple[int, int]
) -> None:
    x = torch.randn(size)
    for axis in (0, 1):
        drawn = Noise().draw(x) if scheme.stochastic else None
        expected = quantize(x, scheme, axis, noise=drawn).dequantize()
        assert same(quantize_dequantize(x, scheme, axis, noise=drawn), expected), axis


def test_a_matrix_that_is_not_contiguous_has_the_values_of_its_copy() -> None:
    x = torch.randn(200, 96).t()
    for scheme in SCHEMES:
        if not scheme.stochastic:
            found = quantize_dequantize(x, scheme, 1)
            assert same(found, quantize_dequantize(x.contiguous(), scheme, 1)), str(scheme)


def test_a_given_scale_is_used_and_what_is_beyond_it_is_cut() -> None:
    x = torch.tensor([[1.0, 600.0, -9000.0, 0.3]])
    found = quantize_dequantize(x, TENSORWISE, 1, scale=torch.tensor(2.0))
    # Halved: 300 lies between 288 and 320, 0.15 between 9/64 and 10/64.
    assert found.tolist() == [[1.0, 576.0, -896.0, 0.3125]]
    expected = quantize(x, TENSORWISE, 1, scale=torch.tensor(2.0)).dequantize()
    assert torch.equal(found, expected)


def test_the_operand_itself_stays_as_it_is() -> None:
    for scheme in SCHEMES:
        x = torch.randn(48, 48)
        before = x.clone()
        noise = Noise().draw(x) if scheme.stochastic else None
        drawn = None if noise is None else noise.clone()
        quantize_dequantize(x, scheme, 1, noise=noise)
        assert torch.equal(x, before)
        assert noise is None or torch.equal(noise, drawn)


def test_underflow_saturation_and_error_are_counted_in_closed_form() -> None:
    # Scale 1: 448 is on the grid, 2^-10 is a tie with zero, 1000 is cut, 17 goes to 16.
    x = torch.tensor([[448.0, 2.0**-10, 1000.0, 17.0, 0.0, -0.25]])
    counted = OperandStatistics()
    quantize_dequantize(x, TENSORWISE, 1, scale=torch.tensor(1.0), statistics=counted)
    errors = (2.0**-10) ** 2 + (1000 - 448) ** 2 + 1
    assert (counted.values, counted.underflowed, counted.saturated) == (6, 1, 1)
    assert counted.squares == pytest.approx(x.double().square().sum().item(), rel=1e-14)
    assert counted.error_squares == pytest.approx(errors, rel=1e-14)
    rates = counted.rates()
    assert rates["underflow"] == pytest.approx(1 / 6)
    assert rates["saturation"] == pytest.approx(1 / 6)
    assert rates["rounding_error"] == pytest.approx((errors / counted.squares) ** 0.5)


def test_counts_of_two_operands_add_up() -> None:
    x, y = torch.randn(2, 40, 64)
    apart, all_or_none, other = OperandStatistics(), OperandStatistics(), OperandStatistics()
    quantize_dequantize(x, SCHEMES[-4], 1, noise=Noise().draw(x), statistics=all_or_none)
    quantize_dequantize(y, SCHEMES[-4], 1, noise=Noise().draw(y), statistics=all_or_none)
    quantize_dequantize(x, SCHEMES[-4], 1, noise=Noise().draw(x), statistics=apart)
    quantize_dequantize(y, SCHEMES[-4], 1, noise=Noise().draw(y), statistics=other)
    apart.add(other)
    assert apart == all_or_none
    assert OperandStatistics().rates() == {
        "underflow": 0.0,
        "saturation": 0.0,
        "rounding_error": 0.0,
    }


def test_no_scale_of_a_tensor_of_its_own_saturates() -> None:
    for scheme in (SCHEMES[0], SCHEMES[1], SCHEMES[4], SCHEMES[6]):
        counted = OperandStatistics()
        quantize_dequantize(torch.randn(300, 300), scheme, 1, statistics=counted)
        assert counted.saturated == 0, str(scheme)
