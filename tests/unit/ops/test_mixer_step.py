"""The functions that Megatron's mixer calls in cached decoding, against the readable ones."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from hybrid_train.ops.conv import causal_conv
from hybrid_train.ops.mixer import (
    causal_conv1d_fn,
    causal_conv1d_update,
    selective_state_update,
)
from hybrid_train.ops.scan import sequential_scan

B, L, H, P, G, N, C, K = 2, 7, 6, 4, 3, 5, 8, 4


def conv_parameters() -> tuple[Tensor, Tensor]:
    return torch.randn(C, K, dtype=torch.float64), torch.randn(C, dtype=torch.float64)


def test_convolution_of_a_prompt_equals_causal_conv() -> None:
    weight, bias = conv_parameters()
    x = torch.randn(B, L, C, dtype=torch.float64)
    actual = causal_conv1d_fn(x=x.mT, weight=weight, bias=bias, seq_idx=None, activation="silu")
    torch.testing.assert_close(actual.mT, causal_conv(x, weight, bias))


def test_convolution_token_by_token_equals_causal_conv() -> None:
    weight, bias = conv_parameters()
    x = torch.randn(B, L, C, dtype=torch.float64)
    state = torch.zeros(B, C, K, dtype=torch.float64)
    steps = [causal_conv1d_update(x[:, t : t + 1], state, weight, bias, "silu") for t in range(L)]
    torch.testing.assert_close(torch.cat(steps, dim=1), causal_conv(x, weight, bias))
    torch.testing.assert_close(state, x[:, -K:].mT)


def test_scan_token_by_token_equals_sequential_scan() -> None:
    x, dt = torch.randn(B, L, H, P).double(), torch.randn(B, L, H).double()
    a, d, dt_bias = -torch.rand(H).double(), torch.randn(H).double(), torch.randn(H).double()
    b, c = torch.randn(2, B, L, G, N).double()
    state = torch.zeros(B, H, P, N, dtype=torch.float64)
    steps = [
        selective_state_update(
            state,
            x[:, t : t + 1],
            dt[:, t : t + 1, :, None].expand(-1, -1, -1, P),
            a[:, None, None].expand(-1, P, N),
            b[:, t : t + 1],
            c[:, t : t + 1],
            d[:, None].expand(-1, P),
            dt_bias=dt_bias[:, None].expand(-1, P),
            dt_softplus=True,
        )
        for t in range(L)
    ]
    expected, last = sequential_scan(x, softplus(dt + dt_bias), a, b, c, d=d)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)
    torch.testing.assert_close(state, last)


def test_what_the_mixer_never_passes_is_refused() -> None:
    weight, bias = conv_parameters()
    x, index = torch.zeros(B, 1, C), torch.zeros(B, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="conv_state_indices not covered"):
        causal_conv1d_update(x, torch.zeros(B, C, K), weight, bias, True, index)
    with pytest.raises(NotImplementedError, match="seq_idx not covered"):
        causal_conv1d_fn(x.mT, weight, bias, index)
    with pytest.raises(NotImplementedError, match="state_batch_indices not covered"):
        selective_state_update(x, x, x, x, x, x, x, state_batch_indices=index)
