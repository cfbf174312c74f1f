"""How operands are quantized, as data, and how each format quantizes each operand of a GEMM.

Sources: per-tensor scaling, Micikevicius et al., arXiv:2209.05433, and Nemotron-H,
arXiv:2504.03624, section 2.4; blocks of 128, DeepSeek-V3, arXiv:2412.19437, section 3.3; MX, the
OCP Microscaling Formats specification 1.0; NVFP4, arXiv:2509.25149, sections 2 to 4.
"""

import enum
from dataclasses import dataclass

from hybrid_train.schema.precision import Gemm, GemmFormat, Precision


class Element(enum.Enum):
    """Format of one value."""

    e4m3 = "e4m3"  # 8 bits, largest 448
    e5m2 = "e5m2"  # 8 bits, largest 57344
    e2m1 = "e2m1"  # 4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6


class Scale(enum.Enum):
    """What the values of a block are divided by before they are rounded."""

    fp32 = "fp32"  # largest magnitude of the block / largest element
    power_of_two = "power_of_two"  # the next power of two above that
    e8m0 = "e8m0"  # a power of two in 8 bits, as in the MX formats of OCP
    e4m3 = "e4m3"  # an E4M3 number times one float32 for the whole tensor, as in NVFP4


class Shape(enum.Enum):
    """Which values share a scale."""

    tensor = "tensor"  # all
    vector = "vector"  # `block` neighbours along the axis that the GEMM sums over
    square = "square"  # `block` x `block`: the matrix and its transpose have the same values


@dataclass(frozen=True)
class Scheme:
    """How one operand is quantized.

    Attributes:
        element: format of the values.
        scale: format of the scales.
        shape: which values share a scale.
        block: length of a vector, side of a square; 0 for a tensor.
        stochastic: round stochastically, so that the mean is exact; else to nearest, ties to
            even.
        hadamard: rotate each 16 neighbours along the axis of the sum by one fixed random Hadamard
            transform first; both operands of a GEMM have it, so its result stays the same.
    """

    element: Element
    scale: Scale
    shape: Shape
    block: int = 0
    stochastic: bool = False
    hadamard: bool = False

    def __str__(self) -> str:
        sizes = {
            Shape.tensor: "one scale",
            Shape.vector: f"1x{self.block}",
            Shape.square: f"{self.block}x{self.block}",
        }
        words = [self.element.value, sizes[self.shape], f"{self.scale.value} scales"]
        words += ["rotated"] if self.hadamard else []
        words += ["stochastic"] if self.stochastic else []
        return ", ".join(words)


class Operand(enum.Enum):
    """What a GEMM multiplies."""

    input = "input"  # [T, I], tokens by input width
    weight = "weight"  # [O, I]
    gradient = "gradient"  # of the output, [T, O]


# The operands of each GEMM, and the axis of each that the GEMM sums over.
OPERANDS: dict[Gemm, tuple[tuple[Operand, int], tuple[Operand, int]]] = {
    Gemm.fprop: ((Operand.input, 1), (Operand.weight, 1)),
    Gemm.dgrad: ((Operand.gradient, 1), (Operand.weight, 0)),
    Gemm.wgrad: ((Operand.gradient, 0), (Operand.input, 0)),
}
_TENSORWISE = (GemmFormat.fp8_tensorwise, GemmFormat.fp8_delayed)
_FP4 = (GemmFormat.nvfp4, GemmFormat.mxfp4)


def schemes(format: GemmFormat, gemm: Gemm, precision: Precision) -> tuple[Scheme, Scheme] | None:
    """Return how both operands of a GEMM are quantized; None where they are not."""
    if format in (GemmFormat.fp32, GemmFormat.bf16):
        return None
    (left, _), (right, _) = OPERANDS[gemm]
    return _scheme(format, left, gemm, precision), _scheme(format, right, gemm, precision)


def operands_as_asked(format: GemmFormat, gemm: Gemm, precision: Precision) -> tuple[str, str]:
    """Say what both operands of a GEMM should be, in the words of an audit."""
    found = schemes(format, gemm, precision)
    if found is None:
        name = {"fp32": "float32", "bf16": "bfloat16"}[format.value]
        return name, name
    left, right = found
    return str(left), str(right)


def _scheme(format: GemmFormat, operand: Operand, gemm: Gemm, precision: Precision) -> Scheme:
    if format in _FP4:
        return _fp4(format, operand, gemm, precision)
    gradient = operand is Operand.gradient
    if format in _TENSORWISE:
        element = _fp8_element(precision, Element.e5m2) if gradient else Element.e4m3
        return Scheme(element, _float_scale(precision, by_default=False), Shape.tensor)
    element = _fp8_element(precision, Element.e4m3) if gradient else Element.e4m3
    if format is GemmFormat.mxfp8:
        return Scheme(element, Scale.e8m0, Shape.vector, 32)
    shape = Shape.square if operand is Operand.weight else Shape.vector
    return Scheme(element, _float_scale(precision, by_default=True), shape, 128)


def _fp4(format: GemmFormat, operand: Operand, gemm: Gemm, precision: Precision) -> Scheme:
    """Stochastic rounding is for gradients alone, and the transform for wgrad alone."""
    nvfp4 = format is GemmFormat.nvfp4
    square = nvfp4 and operand is Operand.weight and precision.square_weight_blocks
    return Scheme(
        Element.e2m1,
        Scale.e4m3 if nvfp4 else Scale.e8m0,
        Shape.square if square else Shape.vector,
        16 if nvfp4 else 32,
        stochastic=precision.stochastic_rounding and operand is Operand.gradient,
        hadamard=precision.hadamard and gemm is Gemm.wgrad,
    )


def _fp8_element(precision: Precision, usual: Element) -> Element:
    return (
        usual if precision.gradient_element is None else Element(precision.gradient_element.value)
    )


def _float_scale(precision: Precision, *, by_default: bool) -> Scale:
    chosen = precision.power_of_two_scales
    return Scale.power_of_two if (by_default if chosen is None else chosen) else Scale.fp32
