"""Cross-entropy over a vocabulary that is split over the ranks of a tensor-parallel group.

Dimensions: V vocabulary, V/tp the part of one rank; any leading dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Return the negative log-probability of each label, in nats.

    Args:
        logits: this rank's slice of the vocabulary, [..., V/tp]; equal slices in rank order.
        labels: token ids in the whole vocabulary, [...].
        group: the tensor-parallel group; None for one process that holds the whole vocabulary.
        vocab_size: tokens of the vocabulary; columns from there on are padding, which has no
            probability and gets no gradient. None: there is no padding.

    Returns:
        Losses, [...], float32 (float64 if the logits are), equal on all ranks of the group.

    Raises:
        ValueError: if the labels do not have the leading shape of the logits.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; logits need {tuple(logits.shape[:-1])}"
        )
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    first = 0 if group is None else dist.get_rank(group) * logits.shape[-1]
    width = logits.shape[-1] if vocab_size is None else vocab_size - first
    width = min(max(width, 0), logits.shape[-1])  # 0: this rank holds nothing but padding
    loss: Tensor = _CrossEntropy.apply(logits, labels, group, first, width)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Keeps the probabilities instead of the logits; the backward writes one tensor of their size.

    torch's softmax is one fused pass on a CPU. The log of its sum is read off where the
    probability is largest, at least 1/V, so that no digits are lost.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        first: int,
        width: int,
    ) -> Tensor:
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        columns = logits[..., :width]
        probs = torch.softmax(columns, dim=-1, dtype=kind)
        if width:
            log_sum = columns.amax(-1).to(kind) - probs.amax(-1).log()
        else:
            log_sum = torch.full(labels.shape, -math.inf, dtype=kind, device=logits.device)
        share = None
        if group is not None:
            total = _log_sum_over_ranks(log_sum, group)
            share = torch.exp(log_sum - total)  # of this rank in the whole probability
            log_sum = total
        local = labels - first
        mine = (local >= 0) & (local < width)
        local = local.clamp(0, logits.shape[-1] - 1)
        picked = logits.gather(-1, local[..., None]).squeeze(-1).to(kind) * mine
        if group is not None:
            dist.all_reduce(picked, group=group)
        ctx.save_for_backward(probs, share, local, mine)
        ctx.logits_type, ctx.padding = logits.dtype, logits.shape[-1] - width
        return log_sum - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        probs, share, local, mine = ctx.saved_tensors
        scale = grad if share is None else grad * share
        width = probs.shape[-1]
        out = probs.new_empty((*probs.shape[:-1], width + ctx.padding))
        torch.mul(probs, scale[..., None], out=out[..., :width])
        out[..., width:] = 0.0
        out.scatter_add_(-1, local[..., None], -(grad * mine)[..., None])
        return out.to(ctx.logits_type), None, None, None, None


def _log_sum_over_ranks(log_sum: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Combine log(sum(exp)) of the slices without leaving the log domain's safe range."""
    top = log_sum.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = torch.exp(log_sum - top)
    dist.all_reduce(total, group=group)
    return top + torch.log(total)
