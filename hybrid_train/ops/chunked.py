"""The chunked Mamba-2 scan with a backward pass of its own.

Within a chunk the scan is a GEMM with a triangular matrix, between chunks a short recurrence
over states (Dao and Gu, arXiv:2405.21060, section 6). The backward is written out since autograd
would keep and rewrite every temporary of the size B * L * H * Q.

Dimensions: B batch, K chunks, Q tokens of a chunk, G groups, R heads of a group, P head width,
N state. Everything inside is laid out chunks first and tokens last, [K, B, G, R, P, Q]: read as
[K*B*G*R, P, Q] or as [K*B*G, R*P, Q] it is an operand of a batched GEMM as it lies, the decay of
a token runs along memory, and the chunks from one to another are one piece of it.

Where several documents share a row, the decay from one to another is zero. Products of decays are
all that joins tokens, forward and backward, so nothing else needs to know.

What a token gives to itself does not depend on the decay. It is kept out of the triangular matrix
(zero diagonal) and joins the direct path, so that the gradient of the decay is no difference of
large equal terms where the decay is strong.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Decays(NamedTuple):
    """Products of exp(dt * a) over spans; from s to t it is pairs * late[t] * early[s]."""

    pairs: Tensor  # zero unless s < t, [K, B, G, R, Q, Q]
    late: Tensor  # close to 1, [K, B, G, R, 1, Q]
    early: Tensor  # close to 1, [K, B, G, R, 1, Q]
    from_start: Tensor  # of the chunk to t, [K, B, G, R, 1, Q]
    to_end: Tensor  # from s to the end of the chunk, [K, B, G, R, 1, Q]


class ChunkedScan(torch.autograd.Function):
    """Scan of operands that are cut into whole chunks; float32 or float64.

    Without a first state the first chunk receives nothing, and unless the last state is wanted the
    last chunk hands nothing on: neither is computed then.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - the operands of the map
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        state: Tensor | None,
        keep_last: bool,
        index: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs [B, K, Q, G, R, P] and, if it is wanted, the last state.

        Args:
            ctx: of autograd.
            x: [B, K, Q, G, R, P].
            dt: [B, K, Q, G, R].
            a: [G, R].
            b: [B, K, Q, G, N].
            c: [B, K, Q, G, N].
            d: [G, R].
            state: [B, G, R, P, N]; None is zero.
            keep_last: whether the last state is returned.
            index: document of each token, non-decreasing, [K, B, Q]; None is one document.
        """
        x = _from_tokens(x)
        dt = dt.permute(1, 0, 3, 4, 2).contiguous()[..., None, :]  # [K, B, G, R, 1, Q]
        b, c = (t.permute(1, 0, 3, 2, 4).contiguous() for t in (b, c))  # [K, B, G, Q, N]
        decays = _decays(dt, a, index)
        overlap = c @ b.mT  # [K, B, G, Q, Q]
        inner = _matmul(x * (dt * decays.early), _mix(decays.pairs, overlap).mT)
        inner.mul_(decays.late)
        states = _states(x * (decays.to_end * dt), b, decays, state, keep_last)
        first = int(state is None)
        carried = _matmul(states[first : len(x)].flatten(3, 4), c[first:].mT)
        inner[first:].addcmul_(carried.view_as(inner[first:]), decays.from_start[first:])
        y = torch.addcmul(inner, x, _own_weight(overlap, dt, d))
        ctx.save_for_backward(x, dt, a, b, c, d, overlap, states, inner, *decays)
        ctx.set_materialize_grads(False)
        ctx.given, ctx.keep_last = state is not None, keep_last
        return _by_token(y), states[-1].clone() if keep_last else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the seven operands."""
        x, dt, a, b, c, d, overlap, states, inner, *rest = ctx.saved_tensors
        decays = _Decays(*rest)
        first, end = int(not ctx.given), len(x) if ctx.keep_last else len(x) - 1
        # Chunks first: receive a state. Chunks up to end: hand one on.
        grad_y = torch.zeros_like(x) if grad_y is None else _from_tokens(grad_y)

        # Own token: y += (dt * c.b + d) * x.
        grad_own = (grad_y * x).sum(-2, keepdim=True)
        own_overlap = _own_overlap(overlap)
        grad_x = grad_y * _own_weight(overlap, dt, d)

        # Earlier tokens of the chunk: y += (overlap * pairs) @ (dt * x).
        grad_steps, grad_overlap = _pairs_backward(x * (dt * decays.early), overlap, decays, grad_y)
        through = _dot(x, grad_steps)
        grad_log = _suffix_sum(_dot(grad_y, inner).sub_(dt * through))
        grad_overlap.diagonal(dim1=-2, dim2=-1).add_((grad_own * dt).sum((-3, -2)))
        grad_c, grad_b = _matmul(grad_overlap, b), _matmul(grad_overlap.mT, c)

        # Earlier chunks: y += from_start * (c @ state).
        grad_carried = (grad_y[first:] * decays.from_start[first:]).flatten(3, 4)
        grad_states = _grad_states(grad_carried, c, decays, states, grad_last)
        _add_matmul(grad_c[first:], grad_carried.mT, states[first : len(x)].flatten(3, 4))

        # state = whole * state + (to_end * dt * x) @ b.
        kept = (x[:end] * (decays.to_end * dt)[:end]).flatten(3, 4)
        grad_added = grad_states[1 : end + 1].flatten(3, 4)
        _add_matmul(grad_b[:end], kept.mT, grad_added)
        grad_kept = _matmul(grad_added, b[:end].mT).view_as(x[:end]).mul_(decays.to_end[:end])
        grad_steps[:end] += grad_kept
        through_states = _dot(x[:end], grad_kept)

        # Decay: what leaves a token t decays over all later ones, what reaches it over all earlier.
        grad_log[first:end] += _through_whole(grad_states, states, decays, first, end)
        grad_log[:end, ..., 1:] += (dt[:end] * through_states).cumsum(-1)[..., :-1]
        through[:end] += through_states
        grad_dt = torch.addcmul(through, grad_log, a[..., None, None])
        grad_dt.addcmul_(grad_own, own_overlap)
        grad_x.addcmul_(grad_steps, dt)
        return (
            _by_token(grad_x),
            grad_dt.squeeze(-2).permute(1, 0, 4, 2, 3),
            (grad_log * dt).sum((0, 1, 4, 5)),
            grad_b.permute(1, 0, 3, 2, 4),
            grad_c.permute(1, 0, 3, 2, 4),
            grad_own.sum((0, 1, 4, 5)),
            grad_states[0] if ctx.given else None,
            None,
            None,
        )


def _pairs_backward(
    steps: Tensor, overlap: Tensor, decays: _Decays, grad_y: Tensor
) -> tuple[Tensor, Tensor]:
    """Reverse y = (overlap * pairs) @ steps: gradients of dt * x and of c.b [K, B, G, Q, Q]."""
    grad = grad_y * decays.late
    grad_steps = _matmul(grad, _mix(decays.pairs, overlap)).mul_(decays.early)
    grad_mix = _matmul(grad.mT, steps)
    grad_overlap = grad_mix[:, :, :, 0] * decays.pairs[:, :, :, 0]
    for head in range(1, grad_mix.shape[3]):
        grad_overlap.addcmul_(grad_mix[:, :, :, head], decays.pairs[:, :, :, head])
    return grad_steps, grad_overlap


def _decays(dt: Tensor, a: Tensor, index: Tensor | None) -> _Decays:
    """Multiply up the decays of dt [K, B, G, R, 1, Q] and a [G, R] within documents.

    The prefix sums are float64: in float32 the difference of two of them would have lost the
    digits that matter where a chunk decays strongly. Each is split into two float32 numbers: the
    powers of the differences of the high ones are the pairs, the powers of the low ones are close
    to 1 and belong to a token alone. Powers of two, since torch's exp on a CPU is four times slower
    than its exp2.
    """
    sums = (dt * (a * math.log2(math.e))[..., None, None]).double().cumsum(-1)
    high = sums.to(dt.dtype)
    # Above 2^5 only where the sums have no digits left behind the point; never infinite.
    low = (sums - high).to(dt.dtype).clamp_(-32, 32)
    size = dt.shape[-1]
    # Above the diagonal the exponent is positive; the power of minus infinity is zero.
    above = high.new_full((size, size), -math.inf).triu_()
    above.masked_fill_(torch.ones_like(above, dtype=torch.bool).tril_(-1), 0)
    if index is not None:
        other = index[..., None] != index[..., None, :]
        above = above.where(~other, -math.inf)[:, :, None, None]  # [K, B, 1, 1, Q, Q]
    pairs = (high.mT - high).add_(above).exp2_()
    from_start = torch.exp2(sums).to(dt.dtype)
    to_end = torch.exp2(sums[..., -1:] - sums).to(dt.dtype)
    if index is not None:
        # A first state belongs to the first document.
        before = torch.cat((index[:1, :, :1], index[:-1, :, -1:]))
        from_start.mul_(_over_heads(index == before))
        to_end.mul_(_over_heads(index == index[..., -1:]))
    return _Decays(pairs, torch.exp2(low), torch.exp2(-low), from_start, to_end)


def _over_heads(mask: Tensor) -> Tensor:
    """Lay out a mask of tokens [K, B, Q] as [K, B, 1, 1, 1, Q]."""
    return mask[:, :, None, None, None]


def _states(
    kept: Tensor, b: Tensor, decays: _Decays, state: Tensor | None, keep_last: bool
) -> Tensor:
    """Run the recurrence over chunks: states before each one and after the last of them.

    Without a first state the first entry is left undefined; the one after the last chunk is there
    if it is wanted. [K or K+1, B, G, R, P, N]
    """
    end = len(kept) if keep_last else len(kept) - 1
    states = kept.new_empty((end + 1, *kept.shape[1:-1], b.shape[-1]))
    if state is not None:
        states[0] = state
    _matmul(kept[:end].flatten(3, 4), b[:end], out=states[1:].flatten(3, 4))
    for index in range(int(state is None), end):
        states[index + 1].addcmul_(decays.from_start[index, ..., -1:], states[index])
    return states


def _grad_states(
    grad_carried: Tensor, c: Tensor, decays: _Decays, states: Tensor, grad_last: Tensor | None
) -> Tensor:
    """Reverse `_states`: gradients of all the states, [K or K+1, B, G, R, P, N]."""
    grads = torch.empty_like(states)
    first = len(c) - len(grad_carried)
    _matmul(grad_carried, c[first:], out=grads[first : len(c)].flatten(3, 4))
    if len(states) > len(c):
        grads[-1] = 0 if grad_last is None else grad_last
    for index in reversed(range(first, len(states) - 1)):
        grads[index].addcmul_(decays.from_start[index, ..., -1:], grads[index + 1])
    return grads


def _through_whole(
    grad_states: Tensor, states: Tensor, decays: _Decays, first: int, end: int
) -> Tensor:
    """Gradient of the log decay of chunks by way of the states before them, [., B, G, R, 1, 1]."""
    before, after = (t.flatten(-2) for t in (states[first:end], grad_states[first + 1 : end + 1]))
    product: Tensor = torch.linalg.vecdot(before, after)
    return product[..., None, None] * decays.from_start[first:end, ..., -1:]


def _mix(pairs: Tensor, overlap: Tensor) -> Tensor:
    """Weights of the tokens of a chunk in each other's outputs, [K, B, G, R, Q, Q]."""
    return pairs * overlap[:, :, :, None]


def _own_overlap(overlap: Tensor) -> Tensor:
    """Product of c and b of the same token: [K, B, G, Q, Q] -> [K, B, G, 1, 1, Q]."""
    return overlap.diagonal(dim1=-2, dim2=-1)[..., None, None, :]


def _own_weight(overlap: Tensor, dt: Tensor, d: Tensor) -> Tensor:
    """Weight of a token's input in its own output, dt * c.b + d: [K, B, G, R, 1, Q]."""
    return torch.addcmul(d[..., None, None], dt, _own_overlap(overlap))


def _suffix_sum(x: Tensor) -> Tensor:
    """Add up from each token to the end of its chunk, over the last dimension."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product over the head width: [K, B, G, R, P, Q] -> [K, B, G, R, 1, Q]."""
    return (x * y).sum(-2, keepdim=True)


def _by_token(x: Tensor) -> Tensor:
    """Lay out [K, B, G, R, P, Q] as [B, K, Q, G, R, P]."""
    return x.permute(1, 0, 5, 2, 3, 4).contiguous()


def _from_tokens(x: Tensor) -> Tensor:
    """Lay out [B, K, Q, G, R, P] as [K, B, G, R, P, Q]."""
    return x.permute(1, 0, 3, 4, 5, 2).contiguous()


def _matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left @ right over any equal batch dimensions, in `out` if there is one."""
    batch = left.shape[:-2]
    into = None if out is None else out.view(-1, *out.shape[-2:])
    y = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out=into)
    return y.view(*batch, *y.shape[-2:])


def _add_matmul(base: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to base, over any batch dimensions."""
    base.view(-1, *base.shape[-2:]).baddbmm_(left.flatten(0, -3), right.flatten(0, -3))
