"""Quantizers against Transformer Engine's own references, bit for bit.

Two things differ, and are meant to. What holds an infinity or NaN is NaN here and finite there,
where a run would go on with it (`broken` is left out). A bfloat16 product of subnormal numbers is
zero on some CPUs, which their transform of 16 neighbours takes; on a GPU it is not.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.precision.formats import encode
from hybrid_train.precision.quantize import (
    AmaxHistory,
    Quantized,
    in_blocks,
    quantize,
)
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)
from hybrid_train.schema.precision import AmaxChoice
from tests.unit.precision.matrices import KINDS
from tests.unit.precision.transformer_engine_references import load

FP8 = {Element.e4m3: torch.float8_e4m3fn, Element.e5m2: torch.float8_e5m2}
FINITE = [name for name in KINDS if name != "broken"]
DTYPES = [torch.float32, torch.bfloat16]
SCALES = [Scale.fp32, Scale.power_of_two]


@pytest.fixture(scope="module")
def engine() -> SimpleNamespace:
    return load()


def matrix(kind: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """A finite matrix: what bfloat16 cannot hold becomes zero."""
    x = KINDS[kind](rows, columns, torch.Generator().manual_seed(0)).to(dtype)
    return torch.where(x.isfinite(), x, 0.0)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert torch.equal(ours.contiguous().view(torch.int32), theirs.contiguous().view(torch.int32))


@pytest.mark.parametrize("kind", FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("element", FP8)
def test_one_scale_a_tensor_is_their_current_scaling(
    engine: SimpleNamespace, element: Element, scale: Scale, dtype: torch.dtype, kind: str
) -> None:
    x = matrix(kind, dtype, 60, 90)
    quantizer = engine.reference_current_scaling.CurrentScalingQuantizerRef(
        FP8[element], pow_2_scales=scale is Scale.power_of_two
    )
    theirs = quantizer.quantize(x)
    ours = quantize(x, Scheme(element, scale, Shape.tensor), 1)
    assert_same_bits(ours.scales.view(1), theirs.scale)
    assert torch.equal(encode(ours.elements, element), theirs.data.view(torch.uint8))
    assert_same_bits(ours.dequantize(), quantizer.dequantize(theirs.data, theirs.scale))
    turned = quantize(x, Scheme(element, scale, Shape.tensor), 0).elements.t()
    assert torch.equal(encode(turned, element), theirs.data_t.view(torch.uint8))


@pytest.mark.parametrize("kind", FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128)], ids=str)
def test_blocks_of_128_have_their_rule_of_scales(
    engine: SimpleNamespace, block: tuple[int, int], scale: Scale, dtype: torch.dtype, kind: str
) -> None:
    x = matrix(kind, dtype, 256, 384)
    shape = Shape.square if block == (128, 128) else Shape.vector
    ours = quantize(x, Scheme(Element.e4m3, scale, shape, 128), int(block[1] == 128))
    blocks = in_blocks(x.float(), block)
    up, down, _ = engine.reference_current_scaling._scale_from_amax_tensor(
        dtype,
        blocks.abs().amax((1, 3), keepdim=True),
        torch.float8_e4m3fn,
        eps=0.0,
        pow_2_scales=scale is Scale.power_of_two,
    )
    data = (blocks * up).to(torch.float8_e4m3fn).view(x.shape)
    assert ours.block == block
    assert_same_bits(ours.scales, down[:, 0, :, 0])
    assert torch.equal(encode(ours.elements, Element.e4m3), data.view(torch.uint8))


def test_delayed_scaling_has_their_rule_of_scales(engine: SimpleNamespace) -> None:
    for amax in [*torch.rand(200).mul(100).tolist(), 1e-38, 1e-44, 3e38, 0.0]:
        history = AmaxHistory(1, AmaxChoice.max)
        largest = torch.tensor([amax])
        ours = history.scale(largest, Element.e4m3)
        _, theirs, _ = engine.reference_current_scaling._scale_from_amax_tensor(
            torch.float32, largest, torch.float8_e4m3fn, eps=0.0, pow_2_scales=False
        )
        assert_same_bits(ours.view(1), theirs)


@pytest.mark.parametrize("kind", FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [Shape.vector, Shape.square])
def test_nvfp4_is_theirs_along_both_axes(
    engine: SimpleNamespace, shape: Shape, dtype: torch.dtype, kind: str
) -> None:
    x = matrix(kind, dtype, 96, 160)
    tile = (16, 16) if shape is Shape.square else (1, 16)
    theirs = nvfp4(engine, tile, with_rht=False).quantize(x)
    scheme = Scheme(Element.e2m1, Scale.e4m3, shape, 16)
    assert_nvfp4(engine, quantize(x, scheme, 1), theirs.data, theirs.scale, tile[0])
    columns = transposed(quantize(x, scheme, 0))
    assert_nvfp4(engine, columns, theirs.data_t, theirs.scale_t, tile[0])
    # They store the largest value where we store the factor back.
    assert_same_bits(columns.tensor_scale.view(1), tensor_scale(theirs.global_amax_col))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, kind) for kind in FINITE]
    + [(torch.bfloat16, kind) for kind in FINITE if kind != "subnormal"],
)
def test_rotated_nvfp4_is_theirs_along_columns(
    engine: SimpleNamespace, dtype: torch.dtype, kind: str
) -> None:
    x = matrix(kind, dtype, 96, 160)
    theirs = nvfp4(engine, (1, 16), with_rht=True).quantize(x)
    scheme = Scheme(Element.e2m1, Scale.e4m3, Shape.vector, 16, hadamard=True)
    ours = transposed(quantize(x, scheme, 0))
    assert_nvfp4(engine, ours, theirs.data_t, theirs.scale_t, 1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (7, 48), (33, 80)])
def test_rows_that_fill_no_square_are_filled_with_zeros_as_theirs(
    engine: SimpleNamespace, rows: int, columns: int
) -> None:
    x = torch.randn(rows, columns)
    quantizer = nvfp4(engine, (16, 16), with_rht=False, columnwise=False)
    ours = quantize(x, Scheme(Element.e2m1, Scale.e4m3, Shape.square, 16), 1)
    theirs = engine.reference_nvfp4.cast_from_fp4x2(quantizer.quantize(x).data, torch.float32)
    assert torch.equal(encode(ours.elements, Element.e2m1), encode(theirs, Element.e2m1))


def nvfp4(engine: SimpleNamespace, tile: tuple[int, int], **options: bool) -> Any:
    reference = engine.reference_nvfp4
    element = reference.reference_utils.Fp4Formats.E2M1
    return reference.NVFP4QuantizerRef(element, quant_tile_shape=tile, **options)


def transposed(matrix: Quantized) -> Quantized:
    elements, scales = matrix.elements.t(), matrix.scales.t()
    return Quantized(elements, scales, matrix.tensor_scale, matrix.block[::-1])


def tensor_scale(amax: Tensor) -> Tensor:
    """The factor back by arXiv:2509.25149, appendix B, in float32."""
    up = torch.div(6 * 448, amax).clamp_max(torch.finfo(torch.float32).max)
    return up.reciprocal()


def assert_nvfp4(
    engine: SimpleNamespace, ours: Quantized, data: Tensor, scale: Tensor, rows: int
) -> None:
    """Compare codes and scales; each row of a square has its scale among theirs."""
    scales = ours.scales.repeat_interleave(rows, 0)
    assert torch.equal(encode(scales, Element.e4m3), scale.view(torch.uint8))
    values = engine.reference_nvfp4.cast_from_fp4x2(data, torch.float32)
    assert torch.equal(ours.elements, values)
