"""Quantization of one operand of a GEMM, written to be read; `operands.py` is its fast twin.

A block of zeros stays zeros. A block with an infinity or NaN becomes NaN. Sizes that are no
multiple of a block are filled up with zeros, and cut again.

Scales: every scale is given as the factor that a value is multiplied with before rounding, and the
factor that brings it back. Orders of operations are those of Transformer Engine 2.20 on a GPU, and
scales and values are those of its reference quantizers (`custom_recipes`) to the bit. On purpose,
what holds an infinity or NaN differs: the engine rounds such a block with a scale of 1, here it
comes back as NaN, so that the run notices it.

torchao 0.18 says the same but for: blocks of MX under the smallest scale (it multiplies by 1 or
2^126, the engine and we by 2^127), FP8 scales of MX a few units in the last place above a power of
two (it takes a logarithm, the instruction cvt.rp and we look at the bits), NVFP4 scales below 2^-6
(it has none) and NVFP4 ties (it divides by the tensor's factor, the engine and we multiply with
the inverse).

Delayed scaling takes the scale of a tensor from the largest values of earlier steps (Micikevicius
et al., arXiv:2209.05433, section 4; Transformer Engine's DelayedScaling with a margin of 0).

The random Hadamard transform of 16 neighbours spreads outliers over them (arXiv:2509.25149,
section 3): T = diag(signs) H / 4 is orthogonal, so where both operands are rotated the result of
the GEMM is the same. The signs are those of Transformer Engine 2.20 (`get_wgrad_sign_vector`), one
set for all layers and steps.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid_train.precision.formats import (
    GRIDS,
    UNIT,
    binade,
    round_to,
    round_to_,
)
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)
from hybrid_train.schema.precision import AmaxChoice

HADAMARD_SIZE = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
_MANTISSA_BITS = 23
_MANTISSA_MASK = 0x7FFFFF
_BIAS = 127
_LARGEST_CODE = 254  # of E8M0; 255 is NaN
_SMALLEST_SCALE = 0x400000  # 2^-127 as bits of a float32, a subnormal number


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
        axis: the one that the GEMM sums over; vectors lie along it. With `hadamard` the result
            is filled up to a multiple of 16 along it: so is the other operand, with zeros.
        scale: factor back of the whole tensor, where it is not taken from the tensor itself.
        noise: of x as `Noise.draw` gives it, with `stochastic`.

    Returns:
        Values and scales.
    """
    values = rotated_by_scheme(x, scheme, axis)
    block = block_of(values, scheme, axis)
    blocks = in_blocks(values, block)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    found = factors_of_scale(scale) if scale is not None else factors(amax, scheme, x.dtype)
    spread = None if noise is None else in_blocks(pad_noise(noise, values.shape), block) * UNIT
    rounded = round_to(blocks * found.encode, scheme.element, spread)
    whole = rounded.flatten(2).flatten(0, 1)
    elements = whole[: values.shape[0], : values.shape[1]]
    return Quantized(elements, found.scales[:, 0, :, 0], found.tensor_scale, block)


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


def pad_noise(noise: Tensor, shape: torch.Size) -> Tensor:
    """Fill the noise up to the size of what it is for; what is added there is zero."""
    return pad(noise, (0, shape[1] - noise.shape[1], 0, shape[0] - noise.shape[0]))


@dataclass(frozen=True)
class Factors:
    """The factors of a tensor's blocks.

    Attributes:
        encode: what values are multiplied with before they are rounded, float32, one a block.
        scales: what is stored with a block: the factor back, without that of the tensor.
        tensor_scale: the factor back of the whole tensor; None where there is none.
    """

    encode: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None

    @property
    def decode(self) -> Tensor:
        """What a rounded value is multiplied with."""
        return self.scales if self.tensor_scale is None else self.scales * self.tensor_scale


def factors(amax: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Factors:
    """Return the factors of blocks with these largest magnitudes.

    Args:
        amax: float32, one a block, of the whole tensor.
        scheme: how the tensor is quantized.
        dtype: of the tensor; limits the scale of a block of tiny values.
    """
    largest = GRIDS[scheme.element].largest
    if scheme.scale is Scale.e4m3:
        return _two_levels(amax, largest)
    if scheme.scale is Scale.e8m0:
        code = _code_of(amax, scheme.element)
        return Factors(_power(2 * _BIAS - code), _marked(_power(code), amax))
    # torch.div, since torch rounds number / tensor twice: the reciprocal, then its multiple.
    encode = torch.div(largest, amax).nan_to_num_(nan=torch.nan, posinf=torch.finfo(dtype).max)
    if scheme.scale is Scale.power_of_two:
        encode = binade(encode)
    encode = encode.masked_fill_(amax == 0, 1.0)
    return Factors(encode, _marked(encode.reciprocal(), amax))


def _marked(scales: Tensor, amax: Tensor) -> Tensor:
    """Make NaN of the scale of what holds an infinity or NaN, in place."""
    return scales.add_(amax, alpha=0.0)


def _code_of(amax: Tensor, element: Element) -> Tensor:
    """Return the E8M0 codes of blocks, int32.

    FP8 blocks take the power of two above amax / largest, as Blackwell does: no value saturates.
    FP4 blocks take that below, as the OCP specification 1.0 says in section 6.3.
    """
    grid = GRIDS[element]
    if element is Element.e2m1:
        exponent = (amax.contiguous().view(torch.int32) >> _MANTISSA_BITS) - grid.max_exponent
        return exponent.clamp_(0, _LARGEST_CODE)
    bits = (amax * _reciprocal(grid.largest)).view(torch.int32)
    bits.masked_fill_(bits <= _SMALLEST_SCALE, 0)  # the smallest power, or below
    return ((bits + _MANTISSA_MASK) >> _MANTISSA_BITS).clamp_(0, _LARGEST_CODE)


def _power(code: Tensor) -> Tensor:
    """Return 2^(code - 127) in float32."""
    return (code << _MANTISSA_BITS).clamp_min_(_SMALLEST_SCALE).view(torch.float32)


@cache
def _reciprocal(value: float) -> float:
    """Return what float32 has for 1 / value."""
    return float(torch.tensor(value).reciprocal())


def _two_levels(amax: Tensor, largest: float) -> Factors:
    """Return the factors of NVFP4 (arXiv:2509.25149, appendix B).

    The whole tensor is brought to 6 x 448; a block then has an E4M3 scale of its own.
    """
    top = GRIDS[Element.e4m3].largest
    whole = amax.amax() if amax.numel() else amax.new_zeros(())
    tensor_encode = torch.div(top * largest, whole).clamp_max_(_LARGEST_FLOAT32)
    tensor_encode.masked_fill_(tensor_encode == 0, 1.0)
    tensor_scale = tensor_encode.reciprocal()
    scales = (amax * (tensor_encode * _reciprocal(largest))).clamp_max_(top)
    scales = round_to_(scales, Element.e4m3, torch.empty_like(scales))
    encode = (scales * tensor_scale).reciprocal_().clamp_max_(_LARGEST_FLOAT32)
    return Factors(encode, _marked(scales, amax), _marked(tensor_scale, whole))


def factors_of_scale(scale: Tensor) -> Factors:
    """Return the factors of a tensor whose factor back is known."""
    scale = scale.reshape(1, 1, 1, 1)
    return Factors(scale.reciprocal(), scale)


class AmaxHistory:
    """The largest magnitudes of one operand in the last steps; it is not saved.

    The first step, of a run or after a resume, takes the present largest value.
    """

    def __init__(self, length: int, choice: AmaxChoice) -> None:
        self._length = length
        self._choice = choice
        self._earlier: list[Tensor] = []  # newest first
        self.seen = torch.zeros(())  # largest of this step

    def scale(self, tensor: Tensor, element: Element) -> Tensor:
        """Return the factor back of a tensor, and remember its largest magnitude."""
        amax = tensor.abs().amax().float() if tensor.numel() else torch.zeros(())
        self.seen = torch.maximum(self.seen.to(amax.device), amax)
        if self._earlier:
            newest_only = self._choice is AmaxChoice.most_recent
            amax = self._earlier[0] if newest_only else torch.stack(self._earlier).amax()
        # torch.div rounds once, number / tensor twice (see `factors`).
        scale = torch.div(GRIDS[element].largest, amax).clamp_max(_LARGEST_FLOAT32)
        return torch.where(amax == 0, 1.0, scale).reciprocal()

    def forget(self) -> None:
        """Begin a step: what was seen since the last one, in a validation, does not count."""
        self.seen = torch.zeros_like(self.seen)

    def roll(self, amax: Tensor) -> None:
        """End a step in which this was the largest magnitude on all ranks that share the tensor."""
        self._earlier = [amax, *self._earlier][: self._length]
        self.forget()


def rotated_by_scheme(x: Tensor, scheme: Scheme, axis: int) -> Tensor:
    """Return the float32 values that are quantized: rotated, where the scheme says so."""
    if not scheme.hadamard:
        return x.to(torch.float32)
    missing = -x.shape[axis] % HADAMARD_SIZE
    return rotate(pad(x, (0, missing) if axis == 1 else (0, 0, 0, missing)), axis)


def rotate(x: Tensor, axis: int) -> Tensor:
    """Rotate each 16 neighbours along an axis of a matrix whose length there is a multiple of 16.

    Returns:
        float32 (float64 if x is); of a bfloat16 matrix rounded to bfloat16, as hardware hands it
        on to quantization.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    t = hadamard_matrix(x.device, kind)
    if axis == 1:
        rotated = (x.to(kind).reshape(-1, HADAMARD_SIZE) @ t).view(x.shape)
    else:
        groups = x.to(kind).reshape(x.shape[0] // HADAMARD_SIZE, HADAMARD_SIZE, x.shape[1])
        rotated = torch.matmul(t.T, groups).view(x.shape)
    return rotated.to(torch.bfloat16).to(kind) if x.dtype == torch.bfloat16 else rotated


@cache
def hadamard_matrix(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return T, [16, 16]; a row vector is rotated by x T."""
    h = torch.ones(1, 1)
    while h.shape[0] < HADAMARD_SIZE:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (torch.tensor(SIGNS)[:, None] * h / 4).to(device, dtype)
