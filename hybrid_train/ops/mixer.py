"""The Mamba-2 mixer between its two projections: of whole sequences, and of cached decoding.

`mixer_forward` is the map itself. The other functions have the names and the argument order that
megatron.core.ssm.mamba_mixer 0.19.2 calls; what it never passes, as with a static cache, is
refused. Those of one token overwrite their states in place, as the kernels do.

Dimensions: B batch, L sequence, C channels, H heads, P head width, G groups, N state, K taps,
packed width = 2 * H * P + 2 * G * N + H in the order z, x, b, c, dt.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from hybrid_train.ops.conv import causal_conv, conv_step
from hybrid_train.ops.scan import chunked_outputs, chunked_scan, scan_step

WIDE_STATE = 64  # the largest N at which the scan on a CPU is faster in short chunks


def mixer_forward(  # noqa: PLR0913 - the parameters of the mixer
    packed: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    d: Tensor,
    *,
    head_width: int,
    groups: int,
    chunk: int,
    sequence_index: Tensor | None = None,
) -> Tensor:
    """Map the packed input projection to the gated scan output, before norm and out_proj.

    Args:
        packed: z, x, b, c, dt of every token, [B, L, packed width].
        conv_weight: kernels over the channels of x, b, c, [H*P + 2*G*N, K].
        conv_bias: [H*P + 2*G*N].
        dt_bias: added to dt before softplus, [H].
        a: decay rates, negative, [H].
        d: weight of the direct path, [H].
        head_width: P.
        groups: G.
        chunk: tokens per chunk of the scan; changes the speed alone.
        sequence_index: number of the document of each token, [B, L], non-decreasing; convolution
            and scan start anew in each. None is one document.

    Returns:
        scan(silu(conv(x, b, c)), softplus(dt + dt_bias)) * silu(z), [B, L, H*P].

    Source: Dao and Gu, arXiv:2405.21060, section 7 and figure 6 (parallel Mamba block).
    """
    heads = dt_bias.shape[0]
    inner = heads * head_width
    z, xbc, dt = packed.split([inner, packed.shape[-1] - inner - heads, heads], dim=-1)
    xbc = causal_conv(xbc, conv_weight, conv_bias, sequence_index=sequence_index)
    state = (xbc.shape[-1] - inner) // (2 * groups)
    x, b, c = xbc.split([inner, groups * state, groups * state], dim=-1)
    kind = torch.float64 if packed.dtype == torch.float64 else torch.float32
    y = chunked_outputs(
        x.unflatten(-1, (heads, head_width)),
        F.softplus(dt.to(kind) + dt_bias.to(kind)),
        a,
        b.unflatten(-1, (groups, state)),
        c.unflatten(-1, (groups, state)),
        chunk=min(chunk, _cpu_chunk(state)) if packed.device.type == "cpu" else chunk,
        d=d,
        sequence_index=sequence_index,
    )
    return (y.flatten(2).to(kind) * F.silu(z.to(kind))).to(packed.dtype)


def _cpu_chunk(state: int) -> int:
    """Return the tokens per chunk at which the scan is fastest on a CPU.

    Triangular matrices grow with the chunk, saved states shrink. Measured with P = 32 and R = 6 to
    8: at N = 128, 64 tokens take a quarter less time than 32; at N = 32, a sixth more.
    """
    return 64 if state > WIDE_STATE else 32


# mamba_ssm gates inside this function where it is given no norm weight, and the mixer then applies
# its own norm without a gate.
def mamba_split_conv1d_scan_combined(  # noqa: PLR0913 - the signature of mamba_ssm
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,  # noqa: N803 - passed by this name
    D: Tensor,  # noqa: N803 - passed by this name
    chunk_size: int,
    *,
    headdim: int | None = None,
    ngroups: int = 1,
    activation: str = "silu",
    norm_before_gate: bool = True,
    seq_idx: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Run `mixer_forward` under the name and arguments of mamba_ssm, as the training path does.

    Raises:
        NotImplementedError: for an argument that is not None and that this path does not cover.
    """
    _refuse("mamba_split_conv1d_scan_combined", **others)
    _require_silu(activation)
    if headdim is None or D.dim() != 1:
        raise NotImplementedError(
            "D has one weight per channel; only one per head is covered: set D_has_hdim=False"
        )
    del norm_before_gate  # orders gate and norm; without a norm weight there is no norm here
    return mixer_forward(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D,
        head_width=headdim, groups=ngroups, chunk=chunk_size, sequence_index=seq_idx,
    )  # fmt: skip


def _require_silu(activation: str) -> None:
    """Raise unless the activation of the convolution is SiLU, the only one of the family."""
    if activation not in ("silu", "swish"):
        raise NotImplementedError(f"activation = {activation!r}: only 'silu' is covered")


def mamba_chunk_scan_combined(  # noqa: PLR0913 - the signature of mamba_ssm
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - passed by this name
    B: Tensor,  # noqa: N803 - passed by this name
    C: Tensor,  # noqa: N803 - passed by this name
    chunk_size: int,
    *,
    D: Tensor | None = None,  # noqa: N803 - passed by this name
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `chunked_scan` under the name and arguments of mamba_ssm, as static prefill does.

    Raises:
        NotImplementedError: for an argument that is not None and that this path does not cover.
    """
    _refuse("mamba_chunk_scan_combined", **others)
    if D is not None and D.dim() != 1:
        raise NotImplementedError(
            "D has one weight per channel; only one per head is covered: set D_has_hdim=False"
        )
    steps = dt.to(torch.float64 if dt.dtype == torch.float64 else torch.float32)
    if dt_bias is not None:
        steps = steps + dt_bias
    if dt_softplus:
        steps = F.softplus(steps)
    y, last = chunked_scan(x, steps, A, B, C, chunk=chunk_size, d=D, initial_state=initial_states)
    if z is not None:
        y = y * F.silu(z)
    return (y, last) if return_final_states else y


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """Run `causal_conv` under the name and layout of causal_conv1d: [B, C, L] -> [B, C, L].

    Raises:
        NotImplementedError: for packed sequences.
    """
    _refuse("causal_conv1d_fn", seq_idx=seq_idx)
    y = causal_conv(x.transpose(1, 2), weight, bias, activation=activation is not None)
    return y.transpose(1, 2)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool | str,
    conv_state_indices: Tensor | None = None,
    intermediate_conv_states: Tensor | None = None,
) -> Tensor:
    """Advance the convolution by one token: x [B, 1, C] -> [B, 1, C].

    Args:
        x: present input, [B, 1, C].
        conv_state: latest inputs, oldest first, [B, C, K]; overwritten.
        weight: kernels, [C, K].
        bias: [C], or None.
        silu_activation: whether SiLU follows; its name counts as yes.
        conv_state_indices: refused.
        intermediate_conv_states: refused.

    Raises:
        NotImplementedError: for the arguments of dynamic batching.
    """
    _refuse(
        "causal_conv1d_update",
        conv_state_indices=conv_state_indices,
        intermediate_conv_states=intermediate_conv_states,
    )
    y, latest = conv_step(conv_state, x.squeeze(1), weight, bias, activation=bool(silu_activation))
    conv_state.copy_(latest)
    return y.unsqueeze(1)


def selective_state_update(  # noqa: PLR0913, PLR0917 - the signature that Megatron calls
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - Megatron's name
    B: Tensor,  # noqa: N803 - Megatron's name
    C: Tensor,  # noqa: N803 - Megatron's name
    D: Tensor,  # noqa: N803 - Megatron's name
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    intermediate_ssm_states: Tensor | None = None,
) -> Tensor:
    """Advance the scan by one token: x [B, 1, H, P] -> [B, 1, H, P].

    Megatron repeats the numbers of a head over its channels and states; the first is taken.

    Args:
        state: state before the token, [B, H, P, N]; overwritten.
        x: input, [B, 1, H, P].
        dt: step sizes, equal within a head, [B, 1, H, P].
        A: decay rates, negative, equal within a head, [H, P, N].
        B: input projection, [B, 1, G, N].
        C: output projection, [B, 1, G, N].
        D: weight of the direct path, equal within a head, [H, P].
        z: refused; the norm behind the scan gates.
        dt_bias: added to `dt`, equal within a head, [H, P].
        dt_softplus: whether softplus makes `dt` positive.
        state_batch_indices: refused.
        intermediate_ssm_states: refused.

    Raises:
        NotImplementedError: for a gate and for the arguments of dynamic batching.
    """
    _refuse(
        "selective_state_update",
        z=z,
        state_batch_indices=state_batch_indices,
        intermediate_ssm_states=intermediate_ssm_states,
    )
    steps = dt[:, 0, :, 0].to(torch.float64 if dt.dtype == torch.float64 else torch.float32)
    if dt_bias is not None:
        steps = steps + dt_bias[:, 0]
    if dt_softplus:
        steps = F.softplus(steps)
    y, last = scan_step(state, x.squeeze(1), steps, A[:, 0, 0], B.squeeze(1), C.squeeze(1), D[:, 0])
    state.copy_(last)
    return y.unsqueeze(1)


def _refuse(function: str, **arguments: object) -> None:
    """Raise for arguments that carry a value; a silent default would compute something else."""
    given = sorted(name for name, value in arguments.items() if value is not None)
    if given:
        raise NotImplementedError(
            f"{function}: {', '.join(given)} not covered by the PyTorch path; "
            "leave it out, or run on a GPU with mamba-ssm"
        )
