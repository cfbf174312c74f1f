"""The Mamba-2 mixer of cached decoding: convolution of a prompt, and one token at a time.

Under the names and argument order that megatron.core.ssm.mamba_mixer 0.19.2 calls; what it never
passes with a static cache is refused. States are overwritten in place, as the kernels do.
Dimensions: B batch, L sequence, C channels, H heads, P head width, G groups, N state, K taps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from hybrid_train.ops.conv import causal_conv, conv_step
from hybrid_train.ops.scan import scan_step


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


def _refuse(function: str, **arguments: Tensor | None) -> None:
    """Raise for arguments that carry a value; a silent default would compute something else."""
    given = sorted(name for name, value in arguments.items() if value is not None)
    if given:
        raise NotImplementedError(
            f"{function}: {', '.join(given)} not covered by the PyTorch path; "
            "leave it out, or run on a GPU with mamba-ssm"
        )
