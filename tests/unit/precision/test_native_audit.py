"""The audit of native GEMMs, on stand-ins for the two sides that it listens between.

They have the classes, fields and calls of Transformer Engine 2.20.2 as far as the audit reads them.
Whether it hears Transformer Engine itself is asked on a GPU (tests/gpu/test_native_precision.py).
"""

import enum
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.gemm_formats import Linear
from hybrid_train.precision.audit import Audit, Seen, observe_calls, operand_in_words
from hybrid_train.precision.recipes import operands_as_asked
from hybrid_train.schema.precision import Gemm, GemmFormat, Precision

LIBRARY = ModuleType("library")


class DType(enum.Enum):
    kFloat8E4M3 = 1
    kFloat8E5M2 = 2
    kFloat4E2M1 = 3


class Storage:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class Float8TensorStorage(Storage): ...


class Float8Tensor(Float8TensorStorage): ...


class Float8BlockwiseQTensorStorage(Storage): ...


class MXFP8TensorStorage(Storage): ...


class NVFP4TensorStorage(Storage): ...


def fp8(element: DType = DType.kFloat8E4M3, **quantizer: Any) -> dict[str, Any]:
    return {"_fp8_dtype": element, "_quantizer": SimpleNamespace(**quantizer)}


def nvfp4(*, square: bool = False, rht: bool = False, stochastic: bool = False) -> Storage:
    quantizer = SimpleNamespace(
        with_2d_quantization=square, with_rht=rht, stochastic_rounding=stochastic
    )
    return NVFP4TensorStorage(_fp4_dtype=DType.kFloat4E2M1, _quantizer=quantizer)


def blockwise(*, square: bool, power: bool) -> Storage:
    fields = fp8(force_pow_2_scales=power)
    return Float8BlockwiseQTensorStorage(_is_2D_scaled=square, **fields)


TENSORWISE, GRADIENT = fp8(force_pow_2_scales=False), fp8(DType.kFloat8E5M2)
NVFP4_PARTS = nvfp4(rht=True), nvfp4(square=True), nvfp4(rht=True, stochastic=True)
BLOCKS = (
    blockwise(square=False, power=True),
    blockwise(square=True, power=True),
    blockwise(square=False, power=True),
)
MX = MXFP8TensorStorage(**fp8())
# Input, weight and gradient as the recipe of each format has them.
OPERANDS = {
    GemmFormat.bf16: (torch.zeros(1, dtype=torch.bfloat16),) * 3,
    GemmFormat.fp8_tensorwise: (
        Float8TensorStorage(**TENSORWISE),
        Float8Tensor(**TENSORWISE),
        Float8TensorStorage(**GRADIENT),
    ),
    GemmFormat.fp8_blockwise: BLOCKS,
    GemmFormat.mxfp8: (MX, MX, MX),
    GemmFormat.nvfp4: NVFP4_PARTS,
}


@pytest.mark.parametrize("format", OPERANDS)
@pytest.mark.parametrize("gemm", Gemm)
def test_operands_are_called_what_the_recipe_calls_them(format: GemmFormat, gemm: Gemm) -> None:
    x, weight, gradient = OPERANDS[format]
    pair = {
        Gemm.fprop: (x, weight),
        Gemm.dgrad: (gradient, weight),
        Gemm.wgrad: (gradient, x),
    }[gemm]
    found = tuple(operand_in_words(operand, gemm) for operand in pair)
    assert found == operands_as_asked(format, gemm, Precision(format=format))


def test_other_options_have_other_words() -> None:
    different = [
        operand_in_words(Float8TensorStorage(**fp8(force_pow_2_scales=True)), Gemm.fprop),
        operand_in_words(Float8TensorStorage(**TENSORWISE), Gemm.fprop),
        operand_in_words(blockwise(square=False, power=False), Gemm.fprop),
        operand_in_words(blockwise(square=False, power=True), Gemm.fprop),
        operand_in_words(nvfp4(), Gemm.wgrad),
        operand_in_words(nvfp4(rht=True), Gemm.wgrad),
        operand_in_words(nvfp4(stochastic=True), Gemm.wgrad),
        operand_in_words(nvfp4(square=True), Gemm.wgrad),
        operand_in_words(MXFP8TensorStorage(**{**fp8(), "_quantizer": None}), Gemm.fprop),
    ]
    assert len(set(different)) == len(different)


def multiply(first: Any, second: Any, layout: str = "TN") -> str:
    return layout


class Products(torch.autograd.Function):
    """Calls the function of GEMMs as linear layers of Transformer Engine do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: GemmFormat) -> Tensor:
        ctx.format = format
        inputs, weight, _ = OPERANDS[format]
        assert LIBRARY.general_gemm(weight, inputs) == "TN"
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        inputs, weight, gradient = OPERANDS[ctx.format]
        assert LIBRARY.general_gemm(weight, gradient, layout="NN") == "NN"
        assert LIBRARY.general_gemm(inputs, gradient, layout="NT") == "NT"
        return 2 * grad, None


class GroupedProducts(torch.autograd.Function):
    """The same for two experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: GemmFormat) -> Tensor:
        ctx.format = format
        inputs, weight, _ = OPERANDS[format]
        LIBRARY.general_gemm([weight, weight], [inputs, inputs])
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        inputs, weight, gradient = OPERANDS[ctx.format]
        LIBRARY.general_gemm([weight] * 2, [gradient] * 2, layout="NN")
        LIBRARY.general_gemm([inputs] * 2, [gradient] * 2, layout="NT")
        return 2 * grad, None


class Layer(torch.nn.Module):
    def __init__(self, format: GemmFormat, gemms: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.format, self.gemms = format, gemms

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.gemms.apply(x, self.format), None


AUDIT = Audit()
FORMATS = [GemmFormat.nvfp4, GemmFormat.bf16, GemmFormat.mxfp8, GemmFormat.nvfp4]
NAMES = [Linear(0, number, "mlp.fc1") for number in range(len(FORMATS))]


@pytest.fixture(params=[Products, GroupedProducts])
def layers(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Layer]]:
    monkeypatch.setattr(LIBRARY, "general_gemm", multiply, raising=False)
    found = [Layer(format, request.param) for format in FORMATS]
    stop = observe_calls(zip(NAMES, found, strict=True), [(LIBRARY, "general_gemm")], AUDIT)
    AUDIT.start()
    yield found
    stop()
    AUDIT.stop()
    assert LIBRARY.general_gemm is multiply


def wanted() -> Seen:
    return {
        (name, gemm): {operands_as_asked(format, gemm, Precision(format=format))}
        for name, format in zip(NAMES, FORMATS, strict=True)
        for gemm in Gemm
    }


def through(layers: list[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)[0].tanh()
    return x


def test_every_product_is_told_of_the_layer_that_multiplies(layers: list[Layer]) -> None:
    through(layers, torch.ones(2, requires_grad=True)).sum().backward()
    assert AUDIT.stop() == wanted()


def test_a_layer_that_is_computed_again_is_told_of_once_more(layers: list[Layer]) -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(2, requires_grad=True)
    middle = checkpoint(lambda x: through(layers[:3], x), x, use_reentrant=True)
    through(layers[3:], middle).sum().backward()
    assert AUDIT.stop() == wanted()


def test_branches_are_kept_apart(layers: list[Layer]) -> None:
    x = torch.ones(2, requires_grad=True)
    (through(layers[:2], x) + through(layers[2:], x)).sum().backward()
    assert AUDIT.stop() == wanted()
