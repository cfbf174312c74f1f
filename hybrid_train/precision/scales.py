"""From the largest magnitude of each block to the scale that its values are divided by.

Every scale is given as the factor that a value is multiplied with before rounding, and the factor
that brings it back. Orders of operations are those of Transformer Engine 2.20 on a GPU, and scales
and values are those of its reference quantizers (`custom_recipes`) to the bit. On purpose, what
holds an infinity or NaN differs: the engine rounds such a block with a scale of 1, here it comes
back as NaN, so that the run notices it.

torchao 0.18 says the same but for: blocks of MX under the smallest scale (it multiplies by 1 or
2^126, the engine and we by 2^127), FP8 scales of MX a few units in the last place above a power of
two (it takes a logarithm, the instruction cvt.rp and we look at the bits), NVFP4 scales below 2^-6
(it has none) and NVFP4 ties (it divides by the tensor's factor, the engine and we multiply with
the inverse).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hybrid_train.precision.formats import GRIDS, binade, round_to_
from hybrid_train.precision.schemes import Element, Scale, Scheme

_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
_MANTISSA_BITS = 23
_MANTISSA_MASK = 0x7FFFFF
_BIAS = 127
_LARGEST_CODE = 254  # of E8M0; 255 is NaN
_SMALLEST_SCALE = 0x400000  # 2^-127 as bits of a float32, a subnormal number


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
    # torch.div, since torch makes two roundings of number / tensor: reciprocal, then product.
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
