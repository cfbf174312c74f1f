"""The transform of 16 neighbours: orthogonal, and what it leaves alone."""

import pytest
import torch

from hybrid_train.precision import quantize
from hybrid_train.precision.quantize import rotated_by_scheme
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)

ROTATED = Scheme(Element.e2m1, Scale.e4m3, Shape.vector, 16, hadamard=True)


def test_the_matrix_is_orthogonal_with_entries_of_one_quarter() -> None:
    t = quantize.hadamard_matrix(torch.device("cpu"), torch.float64)
    assert torch.equal(t @ t.T, torch.eye(16, dtype=torch.float64))
    assert (t.abs() == 0.25).all()


def test_the_signs_are_those_of_transformer_engine() -> None:
    # 2.20, get_wgrad_sign_vector; the first column of a Hadamard matrix has ones alone.
    column = quantize.hadamard_matrix(torch.device("cpu"))[:, 0]
    assert "".join("+" if value > 0 else "-" for value in column) == "+++-+------+-+--"


def test_turning_both_operands_keeps_their_product() -> None:
    left, right = torch.randn(2, 96, 40, dtype=torch.float64)
    gemm = quantize.rotate(left, 0).T @ quantize.rotate(right, 0)
    torch.testing.assert_close(gemm, left.T @ right, rtol=1e-12, atol=1e-12)
    gemm = quantize.rotate(left.T.contiguous(), 1) @ quantize.rotate(right.T.contiguous(), 1).T
    torch.testing.assert_close(gemm, left.T @ right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_axes_are_rotated_alike(dtype: torch.dtype) -> None:
    x = torch.randint(-8, 9, (64, 48)).to(dtype)  # sums of these are exact in any order
    assert torch.equal(quantize.rotate(x, 0), quantize.rotate(x.t().contiguous(), 1).t())


def test_a_single_value_is_spread_over_its_sixteen() -> None:
    x = torch.zeros(1, 48)
    x[0, 20] = 8.0
    found = quantize.rotate(x, 1)
    assert (found[0, 16:32].abs() == 2.0).all()
    assert not found[0, :16].any()
    assert not found[0, 32:].any()


def test_rows_that_are_missing_are_zeros_in_both_operands() -> None:
    left, right = torch.randn(2, 37, 40)
    gemm = rotated_by_scheme(left, ROTATED, 0).T @ rotated_by_scheme(right, ROTATED, 0)
    torch.testing.assert_close(gemm, left.T @ right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "axis"), [((0, 5), 0), ((16, 0), 0), ((0, 16), 1), ((5, 0), 1)])
def test_nothing_turns_into_nothing(shape: tuple[int, int], axis: int) -> None:
    assert quantize.rotate(torch.empty(shape), axis).shape == shape
