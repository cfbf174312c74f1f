"""Quantization of one operand of a matrix product, to be read; `operands.py` is for training.

A block of zeros stays zeros. A block with an infinity or NaN becomes NaN. Sizes that are no
multiple of a block are filled up with zeros, and cut again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid_train.precision import hadamard
from hybrid_train.precision.formats import round_to
from hybrid_train.precision.noise import UNIT
from hybrid_train.precision.scales import Factors, factors
from hybrid_train.precision.schemes import Scheme, Shape


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Attributes:
        elements: rounded values, on the grid of the element, [R, C], float32.
        scales: one a block, float32: [1, 1] for a tensor, else blocks by rows and by columns.
        tensor_scale: a second factor of all blocks; None where there is none.
        block: rows and columns of a block.
    """

    elements: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    block: tuple[int, int]

    def dequantize(self) -> Tensor:
        """Return what the matrix stands for, [R, C], float32."""
        scales = self.scales if self.tensor_scale is None else self.scales * self.tensor_scale
        rows, columns = self.elements.shape
        by_row = scales.repeat_interleave(self.block[0], 0)[:rows]
        return self.elements * by_row.repeat_interleave(self.block[1], 1)[:, :columns]


def quantize(
    x: Tensor,
    scheme: Scheme,
    axis: int,
    *,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
) -> Quantized:
    """Quantize a matrix.

    Args:
        x: [R, C], float32 or bfloat16.
        scheme: how.
        axis: the one that the product sums over; vectors lie along it. With `hadamard` the result
            is filled up to a multiple of 16 along it: so is the other operand, with zeros.
        scale: factor back of the whole tensor, where it is not taken from the tensor itself.
        noise: of x as `Noise.draw` gives it, with `stochastic`.

    Returns:
        Values and scales.
    """
    values = turned(x, scheme, axis)
    block = block_of(values, scheme, axis)
    blocks = in_blocks(values, block)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    found = given(scale) if scale is not None else factors(amax, scheme, x.dtype)
    spread = None if noise is None else in_blocks(filled(noise, values.shape), block) * UNIT
    rounded = round_to(blocks * found.encode, scheme.element, spread)
    whole = rounded.flatten(2).flatten(0, 1)
    elements = whole[: values.shape[0], : values.shape[1]]
    return Quantized(elements, found.scales[:, 0, :, 0], found.tensor_scale, block)


def turned(x: Tensor, scheme: Scheme, axis: int) -> Tensor:
    """Return the float32 values that are rounded: turned, where the scheme says so."""
    if not scheme.hadamard:
        return x.to(torch.float32)
    missing = -x.shape[axis] % hadamard.SIZE
    return hadamard.turn(pad(x, (0, missing) if axis == 1 else (0, 0, 0, missing)), axis)


def block_of(values: Tensor, scheme: Scheme, axis: int) -> tuple[int, int]:
    """Return the rows and columns of a block; one that reaches beyond the matrix ends with it."""
    rows, columns = (max(size, 1) for size in values.shape)
    if scheme.shape is Shape.tensor:
        return rows, columns
    tall, wide = min(scheme.block, rows), min(scheme.block, columns)
    if scheme.shape is Shape.square:
        return tall, wide
    return (1, wide) if axis == 1 else (tall, 1)


def in_blocks(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Cut [R, C] into [rows of blocks, rows of a block, columns of blocks, columns of a block]."""
    rows, columns = -values.shape[0] % block[0], -values.shape[1] % block[1]
    if rows or columns:
        values = pad(values, (0, columns, 0, rows))
    height, width = block
    return values.reshape(values.shape[0] // height, height, values.shape[1] // width, width)


def filled(noise: Tensor, shape: torch.Size) -> Tensor:
    """Fill the noise up to the size of what it is for; what is added there is zero."""
    return pad(noise, (0, shape[1] - noise.shape[1], 0, shape[0] - noise.shape[0]))


def given(scale: Tensor) -> Factors:
    """Return the factors of a tensor whose factor back is known."""
    scale = scale.reshape(1, 1, 1, 1)
    return Factors(scale.reciprocal(), scale)
