"""RMSNorm, RMSNorm over groups of channels behind a gate (Mamba-2), and LayerNorm."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's name for it


def rms_norm(x: Tensor, weight: Tensor, eps: float, channels: Tensor | None = None) -> Tensor:
    """Divide each vector by its root mean square and scale it: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: [..., C].
        weight: [C].
        eps: added to the mean square.
        channels: how many of C the mean is over, where the others are masked, and 0; [].

    Returns:
        [..., C] in the type of `x`; the arithmetic is float32, or float64 if `x` is.

    Source: Zhang and Sennrich, arXiv:1910.07467, equation 4.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return _normed(x.to(kind), weight.to(kind), eps, channels).to(x.dtype)


def layer_norm_1p(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, kept: Tensor | None = None
) -> Tensor:
    """Bring each vector to mean 0 and variance 1, then scale it by 1 + weight and add the bias.

    Args:
        x: [..., C].
        weight: minus 1, [C].
        bias: [C].
        eps: added to the variance.
        kept: 1 for each channel that is not masked; the others are 0 in `x`, and stay 0; [C].

    Returns:
        [..., C] in the type of `x`; the arithmetic is float32, or float64 if `x` is.

    Source: Ba et al., arXiv:1607.06450, equation 4; the weight is stored minus 1 in Nemotron-4,
    arXiv:2402.16819.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, shift, y = weight.to(kind) + 1, bias.to(kind), x.to(kind)
    if kept is None:
        return F.layer_norm(y, weight.shape, scale, shift, eps).to(x.dtype)
    kept = kept.to(kind)
    number = kept.sum()
    centred = (y - y.sum(dim=-1, keepdim=True) / number) * kept
    inverse = (centred.square().sum(dim=-1, keepdim=True) / number + eps).rsqrt()
    return (centred * inverse * scale + shift * kept).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    channels: Tensor | None = None,
) -> Tensor:
    """Multiply by silu(gate), then apply RMSNorm within each group of channels.

    Args:
        x: [..., C].
        gate: [..., C], or None where the gate is already in `x`.
        weight: [C].
        eps: added to the mean square.
        group_size: channels that share a root mean square; divides C.
        channels: how many of a group the mean is over, where the others are masked, and 0; [].

    Returns:
        [..., C] in the type of `x`.

    Raises:
        ValueError: if `group_size` does not divide C.

    Source: Dao and Gu, arXiv:2405.21060, section 7 (extra normalisation); gate before norm.
    """
    if x.shape[-1] % group_size:
        raise ValueError(f"group_size = {group_size}: must divide the {x.shape[-1]} channels")
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(kind)
    if gate is not None:
        y = y * F.silu(gate.to(kind))
    groups = y.unflatten(-1, (-1, group_size))
    scaled = _normed(groups, weight.to(kind).unflatten(0, (-1, group_size)), eps, channels)
    return scaled.flatten(-2).to(x.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float, channels: Tensor | None) -> Tensor:
    if not torch.is_grad_enabled():  # a token's norm costs less than what records it
        return (x * _inverse(x, eps, channels)).mul_(weight)
    y: Tensor = _RmsNorm.apply(x, weight, eps, channels)  # type: ignore[no-untyped-call]
    return y


def _inverse(x: Tensor, eps: float, channels: Tensor | None) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last dimension, kept with size one.

    A Python number beside a tensor costs a small one more than the rest; a `value` does not.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if channels is None:
        square = torch.full_like(length, eps).addcmul_(length, length, value=1 / x.shape[-1])
    else:
        square = length.square() / channels + eps
    return square.rsqrt_()


class _RmsNorm(torch.autograd.Function):
    """RMSNorm over the last dimension; the weight covers the last one or two dimensions.

    Keeps the input and one factor per vector.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, channels: Tensor | None) -> Tensor:
        inverse = _inverse(x, eps, channels)
        ctx.save_for_backward(x, weight, inverse, channels)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse, channels = ctx.saved_tensors
        unit = x * inverse
        grad_weight = (grad * unit).flatten(0, -1 - weight.dim()).sum(0)
        scaled = grad * weight
        along = _dot(scaled, unit) / (x.shape[-1] if channels is None else channels)
        return scaled.addcmul_(unit, along, value=-1).mul_(inverse), grad_weight, None, None


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product over the last dimension, kept with size one."""
    product: Tensor = torch.linalg.vecdot(x, y)
    return product.unsqueeze(-1)
