"""Quantization of an operand for training: `quantize(...).dequantize()` in few passes over memory.

The matrix is worked on in chunks that stay in a core's cache; then a pass costs a fraction of one
over memory. Every function of torch that is used here was chosen by `tests/benchmarks/quantize.py`.
"""

from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from hybrid_train.precision.formats import GRIDS, round_to_
from hybrid_train.precision.quantize import (
    Factors,
    block_of,
    factors,
    factors_of_scale,
    in_blocks,
    pad_noise,
    rotated_by_scheme,
)
from hybrid_train.precision.recipes import (
    Element,
    Scheme,
    Shape,
)

_CHUNK = 262144  # values a thread; with more, scratch leaves the cache, with less, calls cost more
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@dataclass
class OperandStatistics:
    """What rounding did to the values of an operand, summed up.

    Attributes:
        values: all of them.
        underflowed: that were not zero and became zero.
        saturated: beyond the largest element, and cut.
        squares: sum of the squares of the values.
        error_squares: of their errors.
    """

    values: int = 0
    underflowed: int = 0
    saturated: int = 0
    squares: float = 0.0
    error_squares: float = 0.0

    def count(self, values: Tensor, rounded: Tensor, encode: Tensor, largest: float) -> None:
        """Add a chunk of an operand.

        Args:
            values: before, float32.
            rounded: after.
            encode: factor of the values before rounding, to be broadcast.
            largest: element.
        """
        beyond = largest * (1 + 4 * torch.finfo(torch.float32).eps)  # a scale is rounded, too
        self.values += values.numel()
        self.underflowed += int(((values != 0) & (rounded == 0)).sum())
        self.saturated += int(((values * encode).abs() > beyond).sum())
        self.squares += float(values.double().square().sum())
        self.error_squares += float((rounded.double() - values.double()).square().sum())

    def add(self, other: "OperandStatistics") -> None:
        """Add what was counted elsewhere."""
        self.values += other.values
        self.underflowed += other.underflowed
        self.saturated += other.saturated
        self.squares += other.squares
        self.error_squares += other.error_squares

    def rates(self) -> dict[str, float]:
        """Return shares of all values, and the error as a part of the root mean square."""
        values, squares = max(self.values, 1), self.squares or 1.0
        return {
            "underflow": self.underflowed / values,
            "saturation": self.saturated / values,
            "rounding_error": (self.error_squares / squares) ** 0.5,
        }


def quantize_dequantize(
    x: Tensor,
    scheme: Scheme,
    axis: int,
    *,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    statistics: OperandStatistics | None = None,
) -> Tensor:
    """Return the values that an operand has in a GEMM, float32.

    The arguments are those of `quantize`.

    Args:
        x: [R, C], float32 or bfloat16.
        scheme: how it is quantized.
        axis: the one that the GEMM sums over.
        scale: factor back of the whole tensor, for delayed scaling.
        noise: for stochastic rounding.
        statistics: where to count what rounding does; None: nowhere.
    """
    values = rotated_by_scheme(x, scheme, axis) if scheme.hadamard else x
    if not values.numel():
        return values.to(torch.float32)
    # One block of all values needs no second axis, and is cut better without.
    block = (1, 1) if scheme.shape is Shape.tensor else block_of(values, scheme, axis)
    blocks = in_blocks(values.contiguous(), block)
    noise = None if noise is None else in_blocks(pad_noise(noise, values.shape), block)
    if scale is not None:
        found = factors_of_scale(scale)
    elif scheme.shape is Shape.tensor:
        found = factors(_tensor_amax(blocks), scheme, x.dtype)
    else:
        found = factors(_amax(blocks), scheme, x.dtype)
    rounded = _rounded(blocks, found, scheme, noise, is_given=scale is not None)
    if statistics is not None:
        largest = GRIDS[scheme.element].largest
        statistics.count(blocks.to(torch.float32), rounded, found.encode, largest)
    if rounded.numel() == values.numel():
        return rounded.view(values.shape)
    whole = rounded.flatten(2).flatten(0, 1)
    return whole[: values.shape[0], : values.shape[1]]


@dataclass(frozen=True)
class _Cut:
    """How blocks are cut into chunks.

    Attributes:
        rows: of blocks.
        columns: of blocks.
        tall: rows of blocks that are worked on at once.
        wide: columns of blocks that are.
    """

    rows: int
    columns: int
    tall: int
    wide: int

    def chunks(self, tensor: Tensor) -> list[Tensor]:
        """Cut what has one entry for each row and column of blocks, or one for all of them."""
        down, across = -(-self.rows // self.tall), -(-self.columns // self.wide)
        if down * across == 1 or tensor.numel() == 1:
            return [tensor] * (down * across)
        return [chunk for rows in tensor.split(self.tall, 0) for chunk in rows.split(self.wide, 2)]


def _cut(blocks: Tensor) -> _Cut:
    """Return chunks of `_CHUNK` values for each thread; on a GPU all is one chunk."""
    rows, height, columns, width = blocks.shape
    if blocks.device.type != "cpu":
        return _Cut(rows, columns, rows, columns)
    room = _CHUNK * torch.get_num_threads()
    wide = _even(columns, max(1, room // (height * width)))
    tall = _even(rows, max(1, room // (height * width * wide)))
    return _Cut(rows, columns, tall, wide)


def _even(length: int, most: int) -> int:
    """Return the size of chunks of a length that are as large as may be, and alike."""
    return -(-length // -(-length // most))


def _tensor_amax(values: Tensor) -> Tensor:
    low, high = torch.aminmax(values)
    return torch.maximum(low.abs(), high.abs()).to(torch.float32).view(1, 1, 1, 1)


def _amax(blocks: Tensor) -> Tensor:
    """Return the largest magnitude of each block, float32, with blocks of one value.

    Magnitudes are compared as bits: in that order NaN is the largest, and torch is up to three
    times as fast as with floats, where it looks for NaN.
    """
    bits = blocks.view(_BITS[blocks.dtype])
    mask = torch.iinfo(bits.dtype).max
    rows, _, columns, _ = blocks.shape
    found = bits.new_empty(rows, 1, columns, 1)
    cut = _cut(blocks)
    scratch = bits.new_empty(0)
    for chunk, own in zip(cut.chunks(bits), cut.chunks(found), strict=True):
        if scratch.shape != chunk.shape:
            scratch = torch.empty_like(chunk, memory_format=torch.contiguous_format)
        magnitude = torch.bitwise_and(chunk, mask, out=scratch)
        if chunk.shape[1] > 1:
            magnitude = magnitude.amax(1, keepdim=True)
        if chunk.shape[3] > 1:
            magnitude = magnitude.amax(3, keepdim=True)
        own.copy_(magnitude)
    return found.view(blocks.dtype).to(torch.float32)


def _rounded(
    blocks: Tensor, found: Factors, scheme: Scheme, noise: Tensor | None, *, is_given: bool
) -> Tensor:
    """Round every block and bring it back."""
    largest = GRIDS[scheme.element].largest
    # Scales of FP8 leave at most what the grid rounds down to its largest value, with noise, too.
    # A scale of zero may go with an infinite product, which is cut here; times zero it is zero.
    clips = is_given or scheme.element is Element.e2m1
    out = torch.empty(blocks.shape, device=blocks.device)
    cut = _cut(blocks)
    tensors = (blocks, out, found.encode, found.decode)
    chunks = zip(*map(cut.chunks, tensors), strict=True)
    spread = repeat(None) if noise is None else iter(cut.chunks(noise))
    scratch = chance = out.new_empty(0)
    for (chunk, own, up, down), bits in zip(chunks, spread, strict=False):
        if scratch.shape != own.shape:
            scratch = torch.empty_like(own, memory_format=torch.contiguous_format)
            chance = scratch if bits is None else torch.empty_like(scratch)
        if chunk.dtype == own.dtype:
            torch.mul(chunk, up, out=own)
        else:  # multiplying two types would be slower
            own.copy_(chunk).mul_(up)
        if clips:
            own.clamp_(-largest, largest)
        round_to_(own, scheme.element, scratch, None if bits is None else chance.copy_(bits))
        own.mul_(down)
    return out
