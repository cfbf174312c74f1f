"""FP8 primary weights: their values are those of the quantizers, whoever has which part of them."""

import itertools
import random

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from hybrid_train.precision import fp8_weights
from hybrid_train.precision.fp8_weights import Float8Weight, in_fp8, replace_codes
from hybrid_train.precision.quantize import quantize
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)
from tests.unit.precision.matrices import KINDS, same

SCHEMES = [
    Scheme(Element.e4m3, scale, shape, block)
    for scale in (Scale.fp32, Scale.power_of_two)
    for shape, block in ((Shape.tensor, 0), (Shape.square, 16), (Shape.square, 128))
]
SIZES = [(1, 1), (37, 53), (64, 96), (129, 5), (40, 300), (16, 16)]


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_product_takes_the_values_that_it_would_make_of_a_bfloat16_weight(
    scheme: Scheme, kind: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        weight = KINDS[kind](*size, generator).to(torch.bfloat16)
        for axis in (0, 1):  # of the sum of the forward GEMM, and of that of the gradient
            expected = quantize(weight, scheme, axis).dequantize()
            assert same(in_fp8(weight, scheme).dequantize(), expected), size


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("chunk", [fp8_weights._CHUNK, 500])
def test_parts_on_several_ranks_make_the_whole_weight(
    scheme: Scheme, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a part is worked on in many chunks; matrices of training would take minutes."""
    monkeypatch.setattr(fp8_weights, "_CHUNK", chunk)
    rng = random.Random(0)
    for number, size in enumerate(SIZES * 3):
        weight = drawn(*size, seed=number)
        count = weight.numel()
        cuts = sorted({0, count, *(rng.randrange(count + 1) for _ in range(3))})
        parts = [
            (weight.reshape(-1)[start:stop], start) for start, stop in itertools.pairwise(cuts)
        ]
        kept = in_fp8(torch.zeros_like(weight), scheme)
        nothing = kept.largest(weight.new_empty(0), 0)  # of a rank that has no part
        assert not nothing.any()
        kept.set_scales(torch.stack([kept.largest(*part) for part in parts]).amax(0))
        for part in parts:
            kept.write(*part)
        expected = quantize(weight, scheme, axis=1).dequantize()
        assert torch.equal(kept.dequantize(), expected), (size, cuts)


@pytest.fixture
def weight() -> Parameter:
    return Parameter(in_fp8(drawn(8, 12), SCHEMES[0]))


def test_others_see_a_bfloat16_parameter(weight: Parameter) -> None:
    assert isinstance(weight, Float8Weight)
    assert weight.dtype == torch.bfloat16
    assert weight.requires_grad
    plain = weight + 0
    assert type(plain) is Tensor
    assert torch.equal(plain, weight.dequantize().to(torch.bfloat16))
    plain.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(plain))


def test_its_codes_may_lie_in_memory_of_others(weight: Float8Weight) -> None:
    before, memory = weight.dequantize(), torch.zeros(8, 12, dtype=torch.uint8)
    replace_codes(weight, memory)
    assert torch.equal(weight.dequantize(), before)
    memory.zero_()
    assert not weight.dequantize().any()


def test_what_is_copied_in_is_quantized_under_every_name_of_the_weight(
    weight: Float8Weight,
) -> None:
    other = drawn(8, 12, seed=1) * 100
    weight.data.copy_(other)
    assert torch.equal(weight.dequantize(), in_fp8(other, weight.scheme).dequantize())


def test_no_other_change_is_lost_without_a_word(weight: Parameter) -> None:
    with torch.no_grad(), pytest.raises(TypeError, match="changes by copy_ alone"):
        weight.mul_(2)


def test_masters_are_told_the_values_from_before_rounding_once() -> None:
    values = drawn(8, 12)
    weight = in_fp8(values, SCHEMES[0])
    assert torch.equal(weight.get_high_precision_init_val(), values)
    weight.clear_high_precision_init_val()
    with pytest.raises(AssertionError, match="asked once"):
        weight.get_high_precision_init_val()
