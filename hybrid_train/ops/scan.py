"""Mamba-2 selective scan: a readable reference, a chunked form of the same map, a few tokens.

Dimensions: B batch, L sequence, H heads, P head width, G groups, N state, Q chunk, K chunks,
W a few tokens.
Heads g * H/G to (g + 1) * H/G - 1 share the projections b and c of group g.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from hybrid_train.ops.chunked import ChunkedScan


def sequential_scan(  # noqa: PLR0913 - the operands of the map
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    initial_state: Tensor | None = None,
    sequence_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the state-space recurrence one token at a time; slow, and easy to trust.

        state[t] = exp(dt[t] * a) * state[t-1] + dt[t] * outer(x[t], b[t])
        y[t]     = state[t] @ c[t] + d * x[t]

    Args:
        x: inputs, [B, L, H, P].
        dt: step sizes after softplus, not negative, [B, L, H].
        a: decay rates, negative, [H].
        b: input projections, [B, L, G, N].
        c: output projections, [B, L, G, N].
        d: weight of the direct path, [H]; None leaves it out.
        initial_state: state before the first token, [B, H, P, N]; None is zero.
        sequence_index: number of the document of each token, [B, L], non-decreasing; the state
            starts from zero in each but the first. None is one document.

    Returns:
        Outputs [B, L, H, P] in the type of `x`, and the last state [B, H, P, N] in float32
        (float64 if `x` is).

    Raises:
        ValueError: if the shapes do not fit together.

    Source: Dao and Gu, arXiv:2405.21060, section 2 (selective SSM with scalar decay).
    """
    _require_shapes(x, dt, a, b, c)
    state = _first_state(x, b, initial_state)
    outputs = []
    for t in range(x.shape[1]):
        if sequence_index is not None and t > 0:
            same = sequence_index[:, t] == sequence_index[:, t - 1]
            state = state.where(same[:, None, None, None], 0)
        y, state = _step(state, x[:, t], dt[:, t], a, b[:, t], c[:, t], d)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def _step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advance by one token: operands as of `sequential_scan` without their sequence."""
    heads_per_group = x.shape[1] // b.shape[1]
    kind = _compute_type(x)
    xs, dts = x.to(kind), dt.to(kind)
    bs = b.to(kind).repeat_interleave(heads_per_group, dim=1)
    cs = c.to(kind).repeat_interleave(heads_per_group, dim=1)
    decay = torch.exp(dts * a.to(kind))
    fresh = (dts[..., None] * xs)[..., None] * bs[:, :, None, :]
    state = decay[..., None, None] * state.to(kind) + fresh
    y = (state @ cs[..., None]).squeeze(-1)
    if d is not None:
        y = y + d.to(kind)[:, None] * xs
    return y.to(x.dtype), state


def window_scan(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
) -> Tensor:
    """Compute the outputs of `sequential_scan` for a few tokens behind a state, which stays.

    Costs W^2 for W tokens, and one reading of the state whatever W is. `advance` takes as many of
    the tokens into the state as are wanted.

    Args:
        state: before the first token, [B, H, P, N], float32 or float64.
        x: inputs, [B, W, H, P].
        dt: step sizes after softplus, [B, W, H].
        a: decay rates, negative, [H].
        b: input projections, [B, W, G, N].
        c: output projections, [B, W, G, N].
        d: weight of the direct path, [H]; None leaves it out.

    Returns:
        Outputs [B, W, H, P] in the type of the state.
    """
    batch, width, heads, head_width = x.shape
    groups, kind = b.shape[2], state.dtype
    xs, dts = x.to(kind), dt.to(kind)
    bs, cs = b.to(kind).transpose(1, 2), c.to(kind).transpose(1, 2)  # [B, G, W, N]
    decay = (dts * a).cumsum(1).transpose(1, 2)  # log, up to and with each token, [B, H, W]
    grouped = state.reshape(batch, groups, -1, state.shape[-1])
    of_state = (cs @ grouped.mT).view(batch, groups, width, -1, head_width).transpose(2, 3)
    weights = (cs @ bs.mT)[:, :, None] * dts.transpose(1, 2).view(batch, groups, -1, 1, width)
    weights = weights.reshape(batch, heads, width, width)  # of input i in output j, [.., j, i]
    if width > 1:
        between = decay[..., :, None] - decay[..., None, :]
        weights = weights * torch.exp(between.masked_fill(_later(width, x.device), -torch.inf))
    y = weights @ xs.transpose(1, 2)  # [B, H, W, P]
    y = y + of_state.reshape(y.shape) * torch.exp(decay)[..., None]
    y = y.transpose(1, 2)
    return y if d is None else y + d.to(kind)[:, None] * xs


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
) -> Tensor:
    """Do the work of `window_scan` and `advance` for one token of each row, in fewest operations.

    Args:
        state: before the token, [B, H, P, N], overwritten with the one behind it.
        x: inputs in the type of the state, as all operands are, [B, H, P].
        dt: step sizes, [B, H].
        a: decay rates, [H].
        b: input projections, [B * G, 1, N].
        c: output projections, [B * G, 1, N].
        d: weight of the direct path, [H].

    Returns:
        Outputs, [B, H, P].
    """
    of_groups = len(b)
    state.mul_(torch.exp(dt * a)[..., None, None])
    flat = state.view(of_groups, -1, state.shape[-1])
    flat.baddbmm_((x * dt[..., None]).view(of_groups, -1, 1), b)
    # A row times a matrix: a matrix times a column takes twice as long.
    y = torch.bmm(c, flat.mT).view(x.shape)
    return torch.addcmul(y, d[:, None], x)


def advance(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, counts: Tensor | None = None
) -> None:
    """Take tokens into a state, in place; operands as of `window_scan`.

    Args:
        state: [B, H, P, N], overwritten.
        x: inputs, [B, W, H, P].
        dt: step sizes, [B, W, H].
        a: decay rates, [H].
        b: input projections, [B, W, G, N].
        counts: how many tokens of each row count, the first ones, [B]; None: all.
    """
    (batch, width), groups, kind = x.shape[:2], b.shape[2], state.dtype
    dts = dt.to(kind)
    if counts is not None:
        # A step of size 0 neither decays the state nor adds to it.
        dts = dts * (torch.arange(width, device=x.device) < counts[:, None])[..., None]
    decay = (dts * a).cumsum(1)
    weights = dts if width == 1 else dts * torch.exp(decay[:, -1:] - decay)
    fresh = (x.to(kind) * weights[..., None]).reshape(batch, width, groups, -1)
    state.mul_(torch.exp(decay[:, -1])[..., None, None])
    flat = state.view(batch * groups, -1, state.shape[-1])
    flat.baddbmm_(fresh.permute(0, 2, 3, 1).flatten(0, 1), b.to(kind).transpose(1, 2).flatten(0, 1))


@functools.cache
def _later(width: int, device: torch.device) -> Tensor:
    """Tell which inputs come later than an output: [j, i], True where i > j."""
    with torch.inference_mode(False):
        return torch.ones(width, width, dtype=torch.bool, device=device).triu(1)


def chunked_scan(  # noqa: PLR0913 - the operands of the map
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    chunk: int,
    d: Tensor | None = None,
    initial_state: Tensor | None = None,
    sequence_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `sequential_scan` in GEMMs over chunks of `chunk` tokens.

    The result does not depend on `chunk` beyond rounding; any length is legal.

    Raises:
        ValueError: if `chunk` is below 1 or the shapes do not fit together.

    Source: Dao and Gu, arXiv:2405.21060, section 6 (block decomposition).
    """
    _require_shapes(x, dt, a, b, c)
    state = _first_state(x, b, initial_state)
    y, last = _scan(x, dt, a, b, c, d, chunk, state, sequence_index, keep_last=True)
    assert last is not None
    return y, last


def chunked_outputs(  # noqa: PLR0913 - the operands of the map
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    chunk: int,
    d: Tensor | None = None,
    sequence_index: Tensor | None = None,
) -> Tensor:
    """Compute the outputs of `chunked_scan` from a state of zero, and no last state.

    On short sequences it is much cheaper, since the first chunk receives no state and the last one
    computes none.

    Raises:
        ValueError: if `chunk` is below 1 or the shapes do not fit together.
    """
    return _scan(x, dt, a, b, c, d, chunk, None, sequence_index, keep_last=False)[0]


def _scan(  # noqa: PLR0913, PLR0917 - the operands of the map
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    chunk: int,
    state: Tensor | None,
    sequence_index: Tensor | None,
    *,
    keep_last: bool,
) -> tuple[Tensor, Tensor | None]:
    """Cut the operands into chunks, scan them, and put the outputs together again."""
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1")
    _require_shapes(x, dt, a, b, c)
    length, groups, kind = x.shape[1], b.shape[2], _compute_type(x)
    chunk = min(chunk, length)
    direct = torch.zeros_like(a) if d is None else d
    y, last = ChunkedScan.apply(  # type: ignore[no-untyped-call]
        _chunks(x, chunk, kind).unflatten(3, (groups, -1)),
        _chunks(dt, chunk, kind).unflatten(3, (groups, -1)),
        a.to(kind).view(groups, -1),
        _chunks(b, chunk, kind),
        _chunks(c, chunk, kind),
        direct.to(kind).view(groups, -1),
        None if state is None else state.unflatten(1, (groups, -1)),
        keep_last,
        None if sequence_index is None else _chunks_of_index(sequence_index, chunk),
    )
    y = y.flatten(3, 4).flatten(1, 2)[:, :length]
    return y.to(x.dtype), None if last is None else last.flatten(1, 2)


def _chunks(x: Tensor, chunk: int, kind: torch.dtype) -> Tensor:
    """Cut [B, L, ...] into [B, K, chunk, ...].

    A padded token has dt = 0: it neither decays the state nor adds to it.
    """
    rest = -x.shape[1] % chunk
    if rest:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, rest))
    chunks: Tensor = x.to(kind).unflatten(1, (-1, chunk))
    return chunks


def _chunks_of_index(index: Tensor, chunk: int) -> Tensor:
    """Cut [B, L] into [K, B, chunk]; padded tokens belong to the last document."""
    last = index[:, -1:].expand(-1, -index.shape[1] % chunk)
    chunks: Tensor = torch.cat((index, last), dim=1).unflatten(1, (-1, chunk))
    return chunks.transpose(0, 1)


def _first_state(x: Tensor, b: Tensor, given: Tensor | None) -> Tensor:
    """Return the given state, or zeros, [B, H, P, N], in the type of the arithmetic."""
    shape = (x.shape[0], x.shape[2], x.shape[3], b.shape[3])
    if given is None:
        return torch.zeros(shape, dtype=_compute_type(x), device=x.device)
    if given.shape != shape:
        raise ValueError(f"initial_state has shape {tuple(given.shape)}; needs {shape}")
    return given.to(_compute_type(x))


def _compute_type(x: Tensor) -> torch.dtype:
    """Float64 stays float64 (gradient checks need it); everything else is summed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _require_shapes(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """Raise ValueError unless the operands of the scan fit together."""
    batch, length, heads, _ = x.shape
    if length == 0:
        raise ValueError("the scan needs at least one token; x has length 0")
    for name, tensor, shape in (("dt", dt, (batch, length, heads)), ("a", a, (heads,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; needs {shape}")
    for name, tensor in (("b", b), ("c", c)):
        if tensor.shape[:2] != (batch, length) or tensor.shape != b.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; needs [{batch}, {length}, G, N]"
            )
    if heads % b.shape[2]:
        raise ValueError(f"{heads} heads cannot be shared out over {b.shape[2]} groups")
