"""The product of a linear layer and its gradients."""

import pytest
import torch

from hybrid_train.ops.linear import gemm, linear


@pytest.mark.parametrize("shape", [(3,), (1, 3), (5, 2, 3)], ids=str)
def test_linear_passes_gradcheck(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_equals_torch_in_every_format(dtype: torch.dtype) -> None:
    x = torch.randn(7, 2, 33, dtype=dtype, requires_grad=True)
    weight = torch.randn(17, 33, dtype=dtype, requires_grad=True)
    expected = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(linear(x, weight), expected)
    grad = torch.randn_like(expected)
    of_torch = torch.autograd.grad(expected, (x, weight), grad)
    torch.testing.assert_close(torch.autograd.grad(linear(x, weight), (x, weight), grad), of_torch)


def test_product_takes_a_transposed_view() -> None:
    x, weight = torch.randn(6, 17), torch.randn(17, 33)
    torch.testing.assert_close(gemm(x, weight.t()), x @ weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient_is_added_to_the_buffer(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, dtype=dtype)
    weight = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    buffer = torch.ones(4, 3)
    linear(x, weight, buffer).sum().backward()
    expected = 1 + (torch.ones(4, 5, dtype=dtype) @ x).float()
    torch.testing.assert_close(buffer, expected)
