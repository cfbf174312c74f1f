"""Feed-forward experts on tokens sorted by expert.

Dimensions: T tokens (sorted by expert), I input width, F inner width, O output width, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_linear(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Multiply each token by the matrix of its expert.

    Args:
        x: tokens sorted by expert, [T, I].
        weights: one matrix [O, I] per expert.
        counts: tokens of each expert; the sum is T, zeros are legal.

    Returns:
        [T, O]. An expert without tokens gets a gradient of zeros, not None.

    Raises:
        ValueError: if `counts` does not fit `x` or `weights`.
    """
    _require_counts(x, weights, counts)
    y: Tensor = _GroupedLinear.apply(x, tuple(counts), *weights)  # type: ignore[no-untyped-call]
    return y


class _GroupedLinear(torch.autograd.Function):
    """Every expert writes its rows of one output; nothing is concatenated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.counts = counts
        return _gemms(x, weights, counts, transposed=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        return _gemms(grad, weights, ctx.counts), None, *_weight_grads(grad, x, ctx.counts)


def expert_mlp(
    x: Tensor,
    up_weights: Sequence[Tensor],
    down_weights: Sequence[Tensor],
    counts: Sequence[int],
    probs: Tensor,
) -> Tensor:
    """Apply to each token the MLP of its expert: down(relu(up(x))^2 * prob).

    Args:
        x: tokens sorted by expert, [T, I].
        up_weights: one matrix [F, I] per expert.
        down_weights: one matrix [O, F] per expert.
        counts: tokens of each expert; the sum is T, zeros are legal.
        probs: router weight of each token, [T].

    Returns:
        [T, O].

    Raises:
        ValueError: if `counts` does not fit the other arguments.
    """
    _require_counts(x, up_weights, counts)
    _require_counts(x, down_weights, counts)
    if not torch.is_grad_enabled():  # the bookkeeping of so many weights costs as much as few GEMMs
        return _expert_mlp(x, up_weights, down_weights, counts, probs)[0]
    y: Tensor = _ExpertMlp.apply(x, probs, tuple(counts), *up_weights, *down_weights)  # type: ignore[no-untyped-call]
    return y


def _expert_mlp(
    x: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor], counts: Sequence[int], probs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `expert_mlp` does, and max(up(x), 0)."""
    positive = _gemms(x, ups, counts, transposed=True).relu_()
    inner = positive.square().mul_(probs[:, None])
    return _gemms(inner, downs, counts, transposed=True), positive


class _ExpertMlp(torch.autograd.Function):
    """Keeps the input and max(up(x), 0); the scaled square is computed again where needed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probs: Tensor, counts: tuple[int, ...], *weights: Tensor
    ) -> Tensor:
        ups, downs = weights[: len(counts)], weights[len(counts) :]
        y, positive = _expert_mlp(x, ups, downs, counts, probs)
        ctx.save_for_backward(x, probs, positive, *weights)
        ctx.counts = counts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, probs, positive, *weights = ctx.saved_tensors
        counts = ctx.counts
        ups, downs = weights[: len(counts)], weights[len(counts) :]
        inner = positive.square().mul_(probs[:, None])
        grads_down = _weight_grads(grad, inner, counts)
        grad_inner = _gemms(grad, downs, counts)
        # sum(grad * positive^2), and 2 * grad * positive * prob, share grad * positive.
        shared = grad_inner.mul_(positive)
        grad_probs = torch.linalg.vecdot(shared, positive).to(probs.dtype)
        grad_up = shared.mul_(2 * probs[:, None])
        grads_up = _weight_grads(grad_up, x, counts)
        return _gemms(grad_up, ups, counts), grad_probs, None, *grads_up, *grads_down


def chosen_experts(
    x: Tensor,
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    chosen: Tensor,
    probs: Tensor,
) -> Tensor:
    """Send each token through its experts and sum up, without gradients; for generation.

    Args:
        x: tokens in any order, [T, I].
        ups: a matrix [I, F] of each expert.
        downs: a matrix [F, O] of each expert.
        chosen: numbers of the k experts of each token, [T, k].
        probs: their router weights, [T, k].

    Returns:
        [T, O].
    """
    if len(x) == 1:  # in fewer operations, and summed up as below: once, in one order
        numbers, order = chosen[0].sort()
        hit = numbers.tolist()
        inner = torch.cat([x.mm(ups[number]) for number in hit])
        parts = zip(_weighed(inner, probs[0, order, None]).split(1), hit, strict=True)
        y: Tensor = torch.cat([part.mm(downs[number]) for part, number in parts]).sum(0, True)
        return y
    of_pairs = chosen.flatten()
    pairs = of_pairs.argsort(stable=True)  # token by expert, sorted by expert
    places = pairs // chosen.shape[1]
    counts = torch.bincount(of_pairs).tolist()
    hit = [number for number, count in enumerate(counts) if count]
    counts = [counts[number] for number in hit]
    inner = _each(x[places], ups, hit, counts)
    made = _each(_weighed(inner, probs.flatten()[pairs, None]), downs, hit, counts)
    y = made.new_zeros(len(x), made.shape[1])
    return y.index_add_(0, places, made)


def _each(x: Tensor, matrices: Sequence[Tensor], hit: Sequence[int], counts: list[int]) -> Tensor:
    """Multiply rows [N, I], sorted by expert, by the [I, O] of those that are hit."""
    parts = zip(x.split(counts), hit, strict=True)
    return torch.cat([part.mm(matrices[number]) for part, number in parts])


def _weighed(inner: Tensor, probs: Tensor) -> Tensor:
    """Return max(inner, 0)^2 * probs, [N, F] and [N, 1], in the type of `inner`, overwriting it."""
    weighed = inner.relu_().square() * probs
    return weighed.to(inner.dtype)


def _gemms(
    x: Tensor, matrices: Sequence[Tensor], counts: Sequence[int], *, transposed: bool = False
) -> Tensor:
    """Multiply the rows of each expert by its matrix: [T, I] with E times [I, O] -> [T, O].

    Args:
        x: rows sorted by expert, [T, I].
        matrices: [I, O] each.
        counts: rows of each; an expert without any costs nothing.
        transposed: they are [O, I].
    """
    y = x.new_empty(x.shape[0], matrices[0].shape[0 if transposed else 1])
    start = 0
    for count, matrix in zip(counts, matrices, strict=True):
        if count:
            rows = slice(start, start + count)
            torch.mm(x[rows], matrix.t() if transposed else matrix, out=y[rows])
            start += count
    return y


def _weight_grads(grad: Tensor, x: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Gradients [O, I] of the matrices; a GEMM over no tokens gives zeros."""
    parts = zip(grad.split(counts), x.split(counts), strict=True)
    return [rows.T @ tokens for rows, tokens in parts]


def _require_counts(x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> None:
    """Raise ValueError unless there is one count per expert and they add up to the tokens."""
    if len(counts) != len(weights):
        raise ValueError(f"{len(counts)} counts for {len(weights)} experts; needs one each")
    if sum(counts) != x.shape[0]:
        raise ValueError(f"counts add up to {sum(counts)}, but there are {x.shape[0]} tokens")
