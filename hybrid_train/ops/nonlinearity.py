"""What MLPs and experts do between their linears: squared ReLU, and SiLU as a gate.

Each keeps one tensor for its backward pass. Dimensions: T tokens (any leading axes), F neurons.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's name for it


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)^2, element by element.

    Source: So et al., arXiv:2109.08668, section 3 (Primer).
    """
    if not torch.is_grad_enabled():
        positive = torch.relu(x)
        return positive.mul_(positive)
    y: Tensor = _SquaredRelu.apply(x)  # type: ignore[no-untyped-call]
    return y


class _SquaredRelu(torch.autograd.Function):
    """Keeps max(x, 0) and nothing else: its sign and its value are all that the backward needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        positive: Tensor = ctx.saved_tensors[0]
        return (grad * positive).mul_(2)


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up of gates and neurons that lie side by side: [..., 2 F] -> [..., F].

    Source: Shazeer, arXiv:2002.05202, equation 6.
    """
    if not torch.is_grad_enabled():
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    y: Tensor = _SwiGlu.apply(x)  # type: ignore[no-untyped-call]
    return y


class _SwiGlu(torch.autograd.Function):
    """Keeps its input alone; core's own keeps two halves more, and adds an offset of 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        made = torch.empty_like(x)
        (gate, up), (of_gate, of_up) = x.chunk(2, dim=-1), made.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return made
