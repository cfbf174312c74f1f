"""Rotary position embedding: queries and keys are turned by angles that grow with the position.

    y = x * cos(p f) * s + rotate(x) * sin(p f) * s,   rotate((a, b)) = (-b, a)

The first `turned` channels of a head are halves a and b of as many pairs, each with a frequency f;
the others stay as they are; s is `Rope.magnitude`. Source: Su et al., arXiv:2104.09864, section
3.4.2, with pairs as in the released code of Llama. A product of a turned query and key depends on
how far they are apart.

Frequencies are float32, by the operations of the released models in their order: at position 8,000
one bit of a frequency turns a channel by 5e-4, and a float64 that is rounded has another last bit.

Dimensions: D channels of a head, P pairs that are turned, L positions.
"""

import math

import torch
from torch import Tensor

from hybrid_train.schema.model import Rope, RopeScaling


def frequencies(rope: Rope, head_dim: int, length: int) -> Tensor:
    """Return the angle of each pair from one position to the next, [P], float32.

    Args:
        rope: with theta.
        head_dim: D.
        length: of the row; it chooses the list of longrope.

    Sources: llama3: the released code of Llama 3.1 (`apply_scaling`); longrope: Ding et al.,
    arXiv:2402.13753, and the released code of Phi-4-mini.
    """
    turned = rope.turned(head_dim)
    assert rope.theta is not None, "no positions without theta"
    steps = rope.theta ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned)
    if rope.scaling is RopeScaling.longrope:
        factors = rope.long_factors if uses_long(rope, length) else rope.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * steps)
    plain = 1.0 / steps
    return _llama3(plain, rope) if rope.scaling is RopeScaling.llama3 else plain


def uses_long(rope: Rope, length: int) -> bool:
    """Tell whether rows of a length take the long list of longrope."""
    return rope.scaling is RopeScaling.longrope and length > rope.original_length


def _llama3(plain: Tensor, rope: Rope) -> Tensor:
    """Slow channels down by `factor`, between the two wavelengths more the longer they are."""
    low, high, length = rope.low_frequency_factor, rope.high_frequency_factor, rope.original_length
    wavelength = 2 * math.pi / plain
    slowed = torch.where(wavelength > length / low, plain / rope.factor, plain)
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / rope.factor + smooth * slowed
    is_between = (wavelength >= length / high) & (wavelength <= length / low)
    return torch.where(is_between, between, slowed)


def angles(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Return the angle of each channel, those of the second halves again: [L..., 2 P]."""
    of_pairs = positions.float()[..., None] * frequencies
    return torch.cat((of_pairs, of_pairs), dim=-1)


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the first channels of heads.

    Args:
        x: [..., D].
        cosine: of the angles of the first 2 P channels, times s, [..., 2 P], broadcast.
        sine: likewise.

    Returns:
        [..., D] in the type of `x`, in which cosine and sine are, too, as in the released code.
    """
    width = cosine.shape[-1]
    first, half = x[..., :width], width // 2
    rotated = torch.cat((-first[..., half:], first[..., :half]), dim=-1)
    turned = torch.addcmul(first * cosine, rotated, sine)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)
