"""The values of small float formats, and rounding to them: nearest with ties to even, or by chance.

Sources: E4M3 and E5M2, Micikevicius et al., arXiv:2209.05433, table 1 (E4M3 without infinities);
E2M1 and E8M0, the OCP Microscaling Formats specification 1.0, sections 5.3 and 5.4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.precision.noise import UNIT
from hybrid_train.precision.schemes import Element

_MANTISSA = 23  # bits of float32
_EXPONENT_MASK = 0x7F800000
# Added and taken away again, it leaves float32 no room for more than whole steps.
_ROUNDER = 1.5 * 2.0**_MANTISSA


@dataclass(frozen=True)
class Grid:
    """The values of an element.

    Attributes:
        mantissa_bits: digits behind the point.
        min_exponent: of the smallest normal value; below it values are as far apart as above.
        largest: the largest finite value.
    """

    mantissa_bits: int
    min_exponent: int
    largest: float

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value."""
        return int(torch.tensor(self.largest).log2().floor())

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return float(2.0 ** (self.min_exponent - self.mantissa_bits))


GRIDS = {
    Element.e4m3: Grid(mantissa_bits=3, min_exponent=-6, largest=448.0),
    Element.e5m2: Grid(mantissa_bits=2, min_exponent=-14, largest=57344.0),
    Element.e2m1: Grid(mantissa_bits=1, min_exponent=0, largest=6.0),
}


def round_to(x: Tensor, element: Element, noise: Tensor | None = None) -> Tensor:
    """Round float32 to the values of an element.

    Args:
        x: any shape, float32.
        element: what to round to.
        noise: uniform in (-0.5, 0.5), of the shape of x; with it a value goes to one of its two
            neighbours with a mean of itself. None: nearest, ties to even.

    Returns:
        float32. What is beyond the largest value becomes that, infinities included; NaN stays.
    """
    grid = GRIDS[element]
    clipped = x.clamp(-grid.largest, grid.largest)
    step = binade(clipped).clamp_min(2.0**grid.min_exponent) * 2.0**-grid.mantissa_bits
    if noise is not None:
        clipped = clipped + noise * step
    return torch.copysign((clipped / step).round() * step, x).clamp(-grid.largest, grid.largest)


def round_to_(x: Tensor, element: Element, scratch: Tensor, noise: Tensor | None = None) -> Tensor:
    """Round in place like `round_to`, with passes over memory counted; values must be in range.

    Zeros may lose their sign. `scratch` is like x; noise is as whole multiples of `noise.UNIT`.
    """
    grid = GRIDS[element]
    torch.bitwise_and(x.view(torch.int32), _EXPONENT_MASK, out=scratch.view(torch.int32))
    scratch.clamp_min_(2.0**grid.min_exponent)
    step = 2.0**-grid.mantissa_bits
    if noise is not None:
        x.addcmul_(noise, scratch, value=UNIT * step)
    # Both products are exact: a power of two times one with two digits.
    return x.add_(scratch, alpha=_ROUNDER * step).sub_(scratch, alpha=_ROUNDER * step)


def binade(x: Tensor) -> Tensor:
    """Return the power of two at or below the magnitude of each normal float32; 0 for the rest."""
    return (x.contiguous().view(torch.int32) & _EXPONENT_MASK).view(torch.float32)


def encode(values: Tensor, element: Element) -> Tensor:
    """Return the code of each value of an element, uint8: sign, exponent, mantissa.

    E2M1 takes the lower four bits. The values must be on the grid; NaN has no code in E2M1.
    """
    grid = GRIDS[element]
    step = binade(values).clamp_min(2.0**grid.min_exponent)
    normal = values.abs() >= 2.0**grid.min_exponent
    exponent = torch.where(normal, step.log2() - grid.min_exponent + 1, 0.0)
    digits = values.abs() / step * 2.0**grid.mantissa_bits
    digits = torch.where(normal, digits - 2.0**grid.mantissa_bits, digits)
    code = exponent * 2**grid.mantissa_bits + digits
    sign_bit = 8 if element is Element.e2m1 else 128
    code = code + torch.signbit(values) * sign_bit
    if element is not Element.e2m1:
        code = torch.where(values.isnan(), 127.0, code)
    return code.to(torch.uint8)


def decode(codes: Tensor, element: Element) -> Tensor:
    """Return the float32 values of codes, the inverse of `encode`."""
    grid = GRIDS[element]
    sign_bit = 8 if element is Element.e2m1 else 128
    magnitude = (codes.to(torch.int32) & (sign_bit - 1)).to(torch.float32)
    exponent = (magnitude / 2**grid.mantissa_bits).floor()
    digits = magnitude - exponent * 2**grid.mantissa_bits
    normal = exponent > 0
    power = torch.where(normal, exponent - 1, 0.0) + grid.min_exponent
    whole = torch.where(normal, 2.0**grid.mantissa_bits, 0.0)
    value = torch.ldexp((whole + digits) * 2.0**-grid.mantissa_bits, power.to(torch.int32))
    value = torch.where(codes.to(torch.int32) >= sign_bit, -value, value)
    return torch.where(value.abs() > grid.largest, torch.nan, value)
