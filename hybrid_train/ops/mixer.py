"""The Mamba-2 mixer between its two projections.

`mixer_forward` is the map itself. The other function has the name and the argument order that
megatron.core.ssm.mamba_mixer 0.19.2 calls in training; what it never passes is refused.

Dimensions: B batch, L sequence, C channels, H heads, P head width, G groups, N state, K taps,
packed width = 2 * H * P + 2 * G * N + H in the order z, x, b, c, dt.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from hybrid_train.ops.conv import causal_conv
from hybrid_train.ops.scan import chunked_outputs

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


def _refuse(function: str, **arguments: object) -> None:
    """Raise for arguments that carry a value; a silent default would compute something else."""
    given = sorted(name for name, value in arguments.items() if value is not None)
    if given:
        raise NotImplementedError(
            f"{function}: {', '.join(given)} not covered by the PyTorch path; "
            "leave it out, or run on a GPU with mamba-ssm"
        )
