"""The GEMM of a linear layer, with the fastest kernel for it, and with its gradients.

Dimensions: T tokens (any leading axes), I input width, O output width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear(x: Tensor, weight: Tensor, gradient_buffer: Tensor | None = None) -> Tensor:
    """Multiply x [..., I] by weight [O, I]; -> [..., O].

    Args:
        x: inputs.
        weight: matrix, one row per output.
        gradient_buffer: where the gradient of the weight is added while it is computed, [O, I]; its
            gradient is then a tensor of arbitrary content, as Megatron's data parallelism expects.
            None: an ordinary gradient.
    """
    y: Tensor = _Linear.apply(x, weight, gradient_buffer)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient_buffer: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient_buffer = gradient_buffer
        return gemm(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = gemm(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.gradient_buffer is None:
            return grad_x, rows.t() @ inputs, None
        add_gemm(ctx.gradient_buffer, rows, inputs)
        return grad_x, torch.empty_like(weight), None


def gemm(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply without gradients; weight may be a transposed view.

    In float32 on a CPU by oneDNN, which torch takes for other formats only: on the processor tried
    it is about a fifth faster than the default at the sizes of `tests/benchmarks/train_step.py`.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return x @ weight.t()


def add_gemm(buffer: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad^T x to a buffer [O, I] that may have a finer format; grad [T, O], x [T, I]."""
    if grad.dtype == buffer.dtype:
        buffer.addmm_(grad.t(), x)
    else:
        buffer.add_(grad.t() @ x)
