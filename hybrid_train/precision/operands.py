"""Quantization of an operand for training: `quantize(...).dequantize()` in few passes over memory.

The matrix is worked on in pieces that stay in a core's cache; then a pass costs a fraction of one
over memory. Every function of torch that is used here was chosen by `tests/benchmarks/quantize.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from hybrid_train.precision.formats import GRIDS, round_to_
from hybrid_train.precision.quantize import block_of, filled, given, in_blocks, turned
from hybrid_train.precision.scales import Factors, factors
from hybrid_train.precision.schemes import Element, Scheme, Shape

_PIECE = 65536  # values


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
        """Add a piece of an operand.

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
    """Return the values that an operand has in a product, float32.

    The arguments are those of `quantize`; `noise` is overwritten.

    Args:
        x: [R, C], float32 or bfloat16.
        scheme: how it is quantized.
        axis: the one that the product sums over.
        scale: factor back of the whole tensor, for delayed scaling.
        noise: for rounding by chance.
        statistics: where to count what rounding does; None: nowhere.
    """
    values = turned(x, scheme, axis) if scheme.hadamard else x
    if not values.numel():
        return values.to(torch.float32)
    if scheme.shape is Shape.tensor:
        blocks = values.reshape(1, 1, 1, -1)
        noise = None if noise is None else noise.reshape(1, 1, 1, -1)
    else:
        block = block_of(values, scheme, axis)
        blocks = in_blocks(values.contiguous(), block)
        noise = None if noise is None else in_blocks(filled(noise, values.shape), block)
    found = given(scale) if scale is not None else factors(_amax(blocks), scheme, x.dtype)
    rounded = _rounded(blocks, found, scheme, noise, is_given=scale is not None)
    if statistics is not None:
        largest = GRIDS[scheme.element].largest
        statistics.count(blocks.to(torch.float32), rounded, found.encode, largest)
    if scheme.shape is Shape.tensor:
        return rounded.view(values.shape)
    whole = rounded.flatten(2).flatten(0, 1)
    return whole[: values.shape[0], : values.shape[1]]


def _pieces(blocks: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield along which axis to cut, and each slice."""
    cut = 3 if blocks.shape[0] == 1 else 0
    length = blocks.shape[cut]
    size = max(1, _PIECE * torch.get_num_threads() * length // blocks.numel())
    for start in range(0, length, size):
        yield cut, slice(start, start + size)


def _amax(blocks: Tensor) -> Tensor:
    """Return the largest magnitude of each block, float32, with blocks of one value."""
    rows, height, columns, width = blocks.shape
    if rows == height == columns == 1:
        low, high = torch.aminmax(blocks)
        return torch.maximum(-low, high).abs().float().view(1, 1, 1, 1)
    found = torch.empty(rows, 1, columns, 1, device=blocks.device)
    for _, piece in _pieces(blocks) if rows > 1 else [(0, slice(None))]:
        magnitude = blocks[piece].abs()
        if height > 1:
            magnitude = magnitude.amax(1, keepdim=True)
        if width > 1:
            flat = magnitude.float().view(1, 1, -1)
            magnitude = max_pool1d(flat, width).view(-1, 1, columns, 1)
        found[piece] = magnitude
    return found


def _rounded(
    blocks: Tensor, found: Factors, scheme: Scheme, noise: Tensor | None, *, is_given: bool
) -> Tensor:
    """Round every block and bring it back."""
    largest = GRIDS[scheme.element].largest
    # Scales of FP8 leave at most what the grid rounds down to its largest value.
    clips = is_given or noise is not None or scheme.element is Element.e2m1
    decode = found.decode
    # A scale of zero makes zeros of whatever is in its block.
    encode = torch.where(decode == 0, 0.0, found.encode)
    out = torch.empty(blocks.shape, device=blocks.device)
    scratch: Tensor | None = None
    for cut, piece in _pieces(blocks):
        length = len(range(*piece.indices(blocks.shape[cut])))
        own = out.narrow(cut, piece.start, length)
        per_block = slice(None) if cut == 3 else piece  # noqa: PLR2004 - the axis of a tensor
        own.copy_(blocks.narrow(cut, piece.start, length)).mul_(encode[per_block])
        if clips:
            own.clamp_(-largest, largest)
        if scratch is None or scratch.shape != own.shape:
            scratch = torch.empty_like(own)
        part = None if noise is None else noise.narrow(cut, piece.start, length)
        round_to_(own, scheme.element, scratch, part)
        own.mul_(decode[per_block])
    return out
