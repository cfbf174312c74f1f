"""What stands between the linears of an MLP, against its definition and finite differences."""

import torch
from torch.nn import functional as F

from hybrid_train.ops.nonlinearity import squared_relu, swiglu


def test_squared_relu_is_the_square_of_relu_and_passes_gradcheck() -> None:
    x = torch.tensor([-2.0, -0.5, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert squared_relu(x).tolist() == [0.0, 0.0, 0.25, 9.0]
    assert torch.autograd.gradcheck(squared_relu, (x,))


def test_swiglu_gates_the_second_half_by_the_first_and_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 10, generator=generator, dtype=torch.float64).requires_grad_()
    expected = F.silu(x[..., :5]) * x[..., 5:]
    torch.testing.assert_close(swiglu(x), expected)
    torch.testing.assert_close(swiglu(x.detach()), expected)
    with torch.no_grad():
        torch.testing.assert_close(swiglu(x), expected)
    assert torch.autograd.gradcheck(swiglu, (x,))
