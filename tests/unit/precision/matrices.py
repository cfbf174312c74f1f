"""Matrices that quantizers are tried on: of every size, and with what is hard to round."""

import torch
from torch import Tensor

from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)

SCHEMES = [
    *(
        Scheme(element, scale, Shape.tensor)
        for element in (Element.e4m3, Element.e5m2)
        for scale in (Scale.fp32, Scale.power_of_two)
    ),
    *(
        Scheme(Element.e4m3, scale, shape, 128)
        for scale in (Scale.fp32, Scale.power_of_two)
        for shape in (Shape.vector, Shape.square)
    ),
    *(Scheme(element, Scale.e8m0, Shape.vector, 32) for element in Element),
    *(Scheme(one, Scale.e8m0, Shape.vector, 32, stochastic=True) for one in Element),
    Scheme(Element.e4m3, Scale.fp32, Shape.tensor, stochastic=True),
    Scheme(Element.e2m1, Scale.e8m0, Shape.vector, 32, hadamard=True),
    *(
        Scheme(Element.e2m1, Scale.e4m3, shape, 16, stochastic=stochastic, hadamard=rotated)
        for shape in (Shape.vector, Shape.square)
        for stochastic in (False, True)
        for rotated in (False, True)
    ),
]


def wide(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Values of many magnitudes: whole blocks are zeros, or smaller than a scale can say."""
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp(4 * torch.randn(rows, columns, generator=generator))
    x[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    x[torch.rand(rows, columns, generator=generator) < 0.1] = -0.0
    x[rows // 2 :] *= 1e-10
    x[rows // 3 : rows // 2] = 0
    x[rows - rows // 8 :] *= 1e-30
    return x


def ties(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Halves of steps under scales that are powers of two: each block has one 7 x 2^n, the rest
    are small whole numbers of eighths."""
    x = torch.randint(-56, 57, (rows, columns), generator=generator) / 8
    return x.index_fill(1, torch.arange(0, columns, 16), 7.0)


def subnormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Bits of numbers around the smallest normal float32."""
    bits = torch.randint(0, 1 << 25, (rows, columns), generator=generator, dtype=torch.int32)
    return bits.view(torch.float32)


def huge(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Every finite float32 is as likely as the next."""
    bits = torch.randint(-(2**31), 2**31 - 1, (rows, columns), generator=generator)
    x = bits.to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), x, 0.0)


def broken(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Infinities and a NaN among normal values."""
    x = torch.randn(rows, columns, generator=generator)
    for value in (torch.inf, -torch.inf, torch.nan):
        row = int(torch.randint(rows, (), generator=generator))
        x[row, int(torch.randint(columns, (), generator=generator))] = value
    return x


KINDS = {kind.__name__: kind for kind in (wide, ties, subnormal, huge, broken)}


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether two tensors have the same values, NaN included; zeros may differ in sign."""
    return ours.shape == theirs.shape and bool(
        ((ours == theirs) | (ours.isnan() & theirs.isnan())).all()
    )
