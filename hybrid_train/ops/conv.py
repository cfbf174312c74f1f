"""Causal depthwise convolution over time, with SiLU: whole sequences and single steps.

Dimensions: B batch, L sequence, C channels, K kernel width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's name for it


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: bool = True,
    sequence_index: Tensor | None = None,
) -> Tensor:
    """Convolve every channel with its own kernel; no output sees a later input.

        y[t] = silu(bias + sum_k weight[k] * x[t - (K - 1) + k])

    Args:
        x: inputs, [B, L, C].
        weight: kernels, [C, K]; the last tap meets the present input.
        bias: [C], or None.
        activation: whether SiLU follows.
        sequence_index: number of the document of each token, [B, L], non-decreasing; a document but
            the first sees zeros before its start. None is one document.

    Returns:
        Outputs, [B, L, C], in the type of `x`.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    offset = x.new_zeros(x.shape[2]) if bias is None else bias
    heads = None if sequence_index is None else _heads(sequence_index, weight.shape[1] - 1)
    y: Tensor = _CausalConv.apply(  # type: ignore[no-untyped-call]
        x.to(kind), weight.to(kind), offset.to(kind), heads, activation
    )
    return y.to(x.dtype)


class _Heads(NamedTuple):
    """The tokens near the start of a document but the first of a row, which see few inputs."""

    places: Tensor  # in the batch laid out as one row, [T]
    ages: Tensor  # tokens of the same document before them, less than K-1, [T]

    def seen(self, shift: int) -> Tensor:
        """Return which of them see the input `shift` before their own."""
        return (self.ages >= shift).nonzero().squeeze(1)


def _heads(index: Tensor, last: int) -> _Heads:
    """Find the first `last` tokens of every document but the first, of index [B, L]."""
    length = index.shape[1]
    row, before = (index[:, 1:] != index[:, :-1]).nonzero().unbind(1)
    starts, ages = (row * length + before + 1)[:, None], torch.arange(last, device=index.device)
    flat = index.flatten()
    places = (starts + ages).clamp_(max=len(flat) - 1)
    # Not in the next document already, nor in the next row.
    inside = (flat[places] == flat[starts]) & (before[:, None] + 1 + ages < length)
    return _Heads(places[inside], ages.expand_as(places)[inside])


class _CausalConv(torch.autograd.Function):
    """K shifted multiply-adds; on a CPU three times as fast as a depthwise conv1d.

    Outputs that reach back into another document are computed anew from what they may see: they
    are few.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        heads: _Heads | None,
        activation: bool,
    ) -> Tensor:
        taps = weight.T.contiguous()  # [K, C]: a tap of all channels is one run of memory
        last = len(taps) - 1
        y = torch.addcmul(bias, x, taps[last])
        for shift in range(1, min(last + 1, x.shape[1])):
            y[:, shift:].addcmul_(x[:, :-shift], taps[last - shift])
        if heads is not None:
            y.view(-1, y.shape[2])[heads.places] = _head_outputs(x, taps, bias, heads)
        ctx.save_for_backward(x, taps, y if activation else None)
        ctx.heads = heads
        return F.silu(y) if activation else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, before = ctx.saved_tensors
        if before is not None:
            grad = torch.ops.aten.silu_backward(grad, before)
        elif ctx.heads is not None:
            grad = grad.clone()
        grad_bias, grad_heads, last = grad.sum((0, 1)), None, len(taps) - 1
        if ctx.heads is not None:
            flat = grad.view(-1, grad.shape[2])
            grad_heads = flat[ctx.heads.places]
            flat[ctx.heads.places] = 0
        grad_x, grad_taps = torch.empty_like(x), torch.zeros_like(taps)
        # One sequence at a time on a CPU: it stays in the cache from the first tap to the last.
        rows = 1 if x.device.type == "cpu" else len(x)
        for late, early, out in zip(*(t.split(rows) for t in (grad, x, grad_x)), strict=True):
            torch.mul(late, taps[last], out=out)
            grad_taps[last] += (late * early).sum((0, 1))
            for shift in range(1, min(last + 1, x.shape[1])):
                out[:, :-shift].addcmul_(late[:, shift:], taps[last - shift])
                grad_taps[last - shift] += (late[:, shift:] * early[:, :-shift]).sum((0, 1))
        if grad_heads is not None:
            _heads_backward(grad_heads, x, taps, ctx.heads, grad_x, grad_taps)
        return grad_x, grad_taps.T, grad_bias, None, None


def _head_outputs(x: Tensor, taps: Tensor, bias: Tensor, heads: _Heads) -> Tensor:
    """Convolve at the places of `heads` alone, [T, C]."""
    rows, last = x.flatten(0, 1), len(taps) - 1
    y = torch.addcmul(bias, rows[heads.places], taps[last])
    for shift in range(1, last + 1):
        seen = heads.seen(shift)
        y[seen] += rows[heads.places[seen] - shift] * taps[last - shift]
    return y


def _heads_backward(
    grad: Tensor, x: Tensor, taps: Tensor, heads: _Heads, grad_x: Tensor, grad_taps: Tensor
) -> None:
    """Reverse `_head_outputs`: add to the gradients of x [B, L, C] and of the taps [K, C]."""
    rows, grad_rows, last = x.flatten(0, 1), grad_x.view(-1, grad_x.shape[2]), len(taps) - 1
    for shift in range(last + 1):
        seen = heads.seen(shift)
        places = heads.places[seen] - shift
        grad_rows.index_add_(0, places, grad[seen] * taps[last - shift])
        grad_taps[last - shift] += (grad[seen] * rows[places]).sum(0)


def window_conv(inputs: Tensor, weight: Tensor, bias: Tensor, *, activation: bool = True) -> Tensor:
    """Convolve tokens behind K-1 kept inputs, for generation.

    Args:
        inputs: the kept ones, oldest first, then the new ones, [B, K-1 + W, C].
        weight: kernels, a tap of all channels after the other, [K, C].
        bias: [C].
        activation: whether SiLU follows.

    Returns:
        Outputs of the W new ones, [B, W, C], in the type of the weight.
    """
    taps = len(weight)
    width = inputs.shape[1] - taps + 1
    inputs = inputs.to(weight.dtype)
    if width == 1:
        y = (inputs * weight).sum(dim=1, keepdim=True).add_(bias)
    else:
        y = torch.addcmul(bias, inputs[:, :width], weight[0])
        for tap in range(1, taps):
            y.addcmul_(inputs[:, tap : tap + width], weight[tap])
    return F.silu(y) if activation else y
