"""Cross-entropy over a vocabulary that is split over the ranks of a tensor-parallel group.

Dimensions: V vocabulary, V/tp the part of one rank; any leading dimensions.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the negative log-probability of each label, in nats.

    Args:
        logits: this rank's slice of the vocabulary, [..., V/tp]; equal slices in rank order.
        labels: token ids in the whole vocabulary, [...].
        group: the tensor-parallel group; None for one process that holds the whole vocabulary.

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
    loss: Tensor = _CrossEntropy.apply(logits, labels, group)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Keeps the probabilities instead of the logits; the backward writes one tensor of their size.

    torch's softmax is one fused pass on a CPU. The log of its sum is read off where the
    probability is largest, at least 1/V, so that no digits are lost.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        probs = torch.softmax(logits, dim=-1, dtype=kind)
        log_sum = logits.amax(-1).to(kind) - probs.amax(-1).log()
        share, first = None, 0
        if group is not None:
            total = _log_sum_over_ranks(log_sum, group)
            share = torch.exp(log_sum - total)  # of this rank in the whole probability
            log_sum, first = total, dist.get_rank(group) * logits.shape[-1]
        local = labels - first
        mine = (local >= 0) & (local < logits.shape[-1])
        local = local.clamp(0, logits.shape[-1] - 1)
        picked = logits.gather(-1, local[..., None]).squeeze(-1).to(kind) * mine
        if group is not None:
            dist.all_reduce(picked, group=group)
        ctx.save_for_backward(probs, share, local, mine)
        ctx.logits_type = logits.dtype
        return log_sum - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        probs, share, local, mine = ctx.saved_tensors
        scale = grad if share is None else grad * share
        out = probs * scale[..., None]
        out.scatter_add_(-1, local[..., None], -(grad * mine)[..., None])
        return out.to(ctx.logits_type), None, None


def _log_sum_over_ranks(log_sum: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Combine log(sum(exp)) of the slices without leaving the log domain's safe range."""
    top = log_sum.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total = torch.exp(log_sum - top)
    dist.all_reduce(total, group=group)
    return top + torch.log(total)
