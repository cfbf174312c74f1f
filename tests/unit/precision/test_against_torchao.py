"""Quantizers against torchao 0.18, bit for bit where both say the same, and where they do not.

What holds an infinity or NaN is NaN here; torchao gives such blocks a scale, so `broken` is left
out. The other differences have a test each.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hybrid_train.precision.formats import decode, encode
from hybrid_train.precision.quantize import quantize
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)
from tests.unit.precision.matrices import KINDS

FP8 = {Element.e4m3: torch.float8_e4m3fn, Element.e5m2: torch.float8_e5m2}
FINITE = [name for name in KINDS if name != "broken"]
DTYPES = [torch.float32, torch.bfloat16]
MXFP4 = Scheme(Element.e2m1, Scale.e8m0, Shape.vector, 32)
NVFP4 = Scheme(Element.e2m1, Scale.e4m3, Shape.vector, 16)
ULP = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def ao() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.18 has escapes in strings that Python 3.12 warns of
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.prototype.blockwise_fp8_training import kernels as blockwise
        from torchao.prototype.mx_formats import kernels, mx_tensor, nvfp4_tensor
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
    return SimpleNamespace(
        to_mx=mx_tensor.to_mx,
        modes=ScaleCalculationMode,
        unpack=kernels.unpack_uint4,
        nvfp4=nvfp4_tensor,
        blockwise=blockwise,
    )


def matrix(kind: str, dtype: torch.dtype) -> Tensor:
    """A finite matrix: what bfloat16 cannot hold becomes zero."""
    x = KINDS[kind](256, 384, torch.Generator().manual_seed(0)).to(dtype)
    return torch.where(x.isfinite(), x, 0.0)


def code(scales: Tensor) -> Tensor:
    """The E8M0 codes of powers of two."""
    return (scales.log2() + 127).to(torch.uint8)


def in_rows_of_32(x: Tensor) -> Tensor:
    return x.view(len(x), -1, 32)


@pytest.mark.parametrize("kind", FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("element", FP8)
def test_mxfp8_is_theirs_with_scales_rounded_up(
    ao: SimpleNamespace, element: Element, dtype: torch.dtype, kind: str
) -> None:
    x = matrix(kind, dtype)
    scales, data = ao.to_mx(x, FP8[element], 32, ao.modes.RCEIL)
    ours = quantize(x, Scheme(element, Scale.e8m0, Shape.vector, 32), 1)
    assert torch.equal(code(ours.scales), scales.view(torch.uint8))
    # Under the smallest scale, 2^-127, they leave values as they are, so that all become zero;
    # Transformer Engine multiplies with 2^127 (exp2f_rcp), and so do we.
    smallest = in_rows_of_32(data.float())[scales.view(torch.uint8) == 0]
    assert not smallest.any()
    usual = scales.view(torch.uint8) > 0
    codes = in_rows_of_32(encode(ours.elements, element))
    assert torch.equal(codes[usual], in_rows_of_32(data.view(torch.uint8))[usual])
    assert usual.any() or kind == "subnormal"


@pytest.mark.parametrize("element", FP8)
def test_mxfp8_scales_are_rounded_up_where_their_logarithm_is_not(
    ao: SimpleNamespace, element: Element
) -> None:
    # A value beyond 1.75 x 2^n needs the next power of two, as cvt.rp finds; log2 in float32 loses
    # what is a few units in the last place beyond.
    largest = torch.tensor(torch.finfo(FP8[element]).max)
    powers = torch.arange(-100, 100)
    lost = 0
    for ulps in (0, 1, 2, 3, 100):
        x = torch.zeros(len(powers), 32)
        x[:, 3] = torch.ldexp((largest * (1 + ulps * ULP)).expand(len(powers)), powers)
        ours = quantize(x, Scheme(element, Scale.e8m0, Shape.vector, 32), 1)
        expected = powers + (ulps > 0) + 127
        assert torch.equal(code(ours.scales)[:, 0].long(), expected)
        theirs = ao.to_mx(x, FP8[element], 32, ao.modes.RCEIL)[0].view(torch.uint8)[:, 0].long()
        lost += int((theirs != expected).sum())
        assert ulps in (1, 2, 3) or torch.equal(theirs, expected)
        assert ((theirs == expected) | (theirs == expected - 1)).all()
    assert lost > 0


@pytest.mark.parametrize("kind", FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_is_theirs_with_scales_rounded_down(
    ao: SimpleNamespace, dtype: torch.dtype, kind: str
) -> None:
    x = matrix(kind, dtype)
    scales, data = ao.to_mx(x, torch.float4_e2m1fn_x2, 32, ao.modes.FLOOR)
    ours = quantize(x, MXFP4, 1)
    assert torch.equal(code(ours.scales), scales.view(torch.uint8))
    # They divide by 2^-126 where the scale that they store is 2^-127.
    usual = scales.view(torch.uint8) > 0
    codes = in_rows_of_32(encode(ours.elements, Element.e2m1))
    theirs = in_rows_of_32(ao.unpack(data).view(x.shape))
    assert torch.equal(codes[usual], theirs[usual])
    assert usual.any() or kind == "subnormal"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvfp4_differs_only_at_ties_and_under_small_scales(
    ao: SimpleNamespace, dtype: torch.dtype
) -> None:
    """They divide by the tensor's factor where we multiply with its inverse, as hardware does.

    That moves a scale or value by some units in the last place of float32, which decides a tie.
    And they raise a scale to 2^-6, where E4M3 has smaller ones that Transformer Engine uses.
    """
    x = torch.randn(512, 512) * torch.exp(2 * torch.randn(512, 32)).repeat_interleave(16, 1)
    x = x.to(dtype)
    tensor_scale = ao.nvfp4.per_tensor_amax_to_scale(x.abs().amax())
    scales, data = ao.nvfp4.nvfp4_quantize(x, 16, tensor_scale)
    ours, theirs = quantize(x, NVFP4, 1), scales.float()
    torch.testing.assert_close(ours.tensor_scale, tensor_scale, rtol=2 * ULP, atol=0)

    smallest_normal = 2.0**-6
    small = ours.scales < smallest_normal
    assert (theirs[small] == smallest_normal).all()
    wanted = x.float().view(512, -1, 16).abs().amax(-1) / 6 / tensor_scale
    unlike = (ours.scales != theirs) & ~small
    middle = (ours.scales + theirs)[unlike] / 2
    assert ((wanted[unlike] - middle).abs() <= 4 * ULP * middle).all()
    assert unlike.float().mean() < 1e-2

    alike = (ours.scales == theirs).repeat_interleave(16, 1)
    values = decode(ao.unpack(data).view(x.shape), Element.e2m1)
    scaled = x.float() / (ours.scales * ours.tensor_scale).repeat_interleave(16, 1)
    differ = (ours.elements != values) & alike
    middle = (ours.elements + values)[differ] / 2
    assert ((scaled[differ] - middle).abs() <= 4 * ULP * middle.abs()).all()
    assert alike.float().mean() > 0.9
    assert differ.float().mean() < 1e-2


@pytest.mark.parametrize("kind", FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128)], ids=str)
def test_blocks_of_128_are_those_of_their_blockwise_training(
    ao: SimpleNamespace, block: tuple[int, int], dtype: torch.dtype, kind: str
) -> None:
    x = matrix(kind, dtype)
    theirs = {
        (1, 128): ao.blockwise.torch_blockwise_scale_act_quant_lhs,
        (128, 1): ao.blockwise.torch_blockwise_scale_act_quant_rhs,
        (128, 128): ao.blockwise.torch_blockwise_scale_weight_quant,
    }
    data, scales = theirs[block](x)
    shape = Shape.square if block == (128, 128) else Shape.vector
    ours = quantize(x, Scheme(Element.e4m3, Scale.fp32, shape, 128), int(block[1] == 128))
    # They take 1e-12 for the largest magnitude of a block where that is smaller.
    usual = ours.scales * 448 > 1e-12
    usual &= ours.scales != 1  # a block of zeros
    assert torch.equal(ours.scales[usual], scales[usual])
    spread = usual.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    codes = encode(ours.elements, Element.e4m3)
    assert torch.equal(codes[spread], data.view(torch.uint8)[spread])
    assert usual.any() or kind == "subnormal"
