"""How an operand of a matrix product is quantized, as data: element, block, scale, rounding."""

import enum
from dataclasses import dataclass


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
    vector = "vector"  # `block` neighbours along the axis that the product sums over
    square = "square"  # `block` x `block`: the matrix and its transpose have the same values


@dataclass(frozen=True)
class Scheme:
    """How one operand is quantized.

    Attributes:
        element: format of the values.
        scale: format of the scales.
        shape: which values share a scale.
        block: length of a vector, side of a square; 0 for a tensor.
        stochastic: round up or down by chance, so that the mean is exact; else to nearest, ties to
            even.
        hadamard: turn each 16 neighbours along the axis of the sum by one fixed random Hadamard
            transform first; both operands of a product have it, so the product stays.
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
        words += ["turned"] if self.hadamard else []
        words += ["by chance"] if self.stochastic else []
        return ", ".join(words)
