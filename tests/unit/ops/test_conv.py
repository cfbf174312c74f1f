"""The causal convolution against torch's, finite differences, and its windows."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_train.ops.conv import causal_conv, window_conv
from tests.packed import index_of, spans


def conv_inputs(length: int, taps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, 3), (3, taps), (3,))
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return x, weight, bias


@pytest.mark.parametrize("length", [1, 3, 9], ids="length={}".format)
@pytest.mark.parametrize("activation", [True, False], ids="silu={}".format)
def test_causal_conv_equals_a_padded_depthwise_conv1d(length: int, activation: bool) -> None:
    x, weight, bias = conv_inputs(length)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    expected = F.conv1d(padded, weight[:, None], bias, groups=3).transpose(1, 2)
    if activation:
        expected = F.silu(expected)
    actual = causal_conv(x, weight, bias, activation=activation)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("length", [1, 2, 6], ids="length={}".format)
@pytest.mark.parametrize("activation", [True, False], ids="silu={}".format)
@pytest.mark.parametrize("taps", [1, 2, 4], ids="taps={}".format)
def test_causal_conv_passes_gradcheck(length: int, activation: bool, taps: int) -> None:
    inputs = tuple(t.requires_grad_() for t in conv_inputs(length, taps))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv(x, weight, bias, activation=activation)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(
        lambda x, weight: causal_conv(x, weight, None, activation=activation), inputs[:2]
    )


@pytest.mark.parametrize("width", [1, 2, 6], ids="window={}".format)
def test_a_window_behind_kept_inputs_equals_the_whole_sequence(width: int) -> None:
    x, weight, bias = conv_inputs(9)
    whole = causal_conv(x, weight, bias)
    inputs = x[:, 9 - width - 3 :]  # the three before the window, and the window
    actual = window_conv(inputs, weight.t().contiguous(), bias)
    torch.testing.assert_close(actual, whole[:, 9 - width :])


def test_bfloat16_is_computed_in_float32() -> None:
    x, weight, bias = (t.bfloat16() for t in conv_inputs(9))
    y = causal_conv(x.requires_grad_(), weight, bias)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    expected = causal_conv(x.detach().float(), weight.float(), bias.float())
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=0)  # rounded once


@pytest.mark.parametrize("activation", [True, False], ids="silu={}".format)
@pytest.mark.parametrize("taps", [1, 2, 4], ids="taps={}".format)
def test_documents_that_share_a_row_are_convolved_as_if_alone(activation: bool, taps: int) -> None:
    index = index_of([4, 1, 2, 3, 1], [2, 9])
    x, weight, bias = (t.requires_grad_() for t in conv_inputs(11, taps))
    found = causal_conv(x, weight, bias, activation=activation, sequence_index=index)
    rows: list[list[Tensor]] = [[], []]
    for row, start, end in spans(index):
        part = x[row : row + 1, start:end]
        rows[row].append(causal_conv(part, weight, bias, activation=activation))
    expected = torch.cat([torch.cat(row, dim=1) for row in rows])
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (x, weight, bias)),
        torch.autograd.grad((expected * weights).sum(), (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
