"""Small float formats: their values, rounding to them, its noise, and remainders of bfloat16.

Rounding is to nearest even or stochastic. The noise of the n-th tensor of a step follows from seed,
step, rank and n, so that a resumed run rounds like one that never stopped.

A remainder is the 16 bits by which a float32 number differs from the bfloat16 next to it. Numbers
of one sign lie in the order of their bits, so the bits of the float32 number are those of the
bfloat16 one, 16 places higher, plus the signed remainder. Together they take as much as the float32
number, and the bfloat16 part is what the forward pass needs anyway: a master weight costs two bytes
more than its weight. So Transformer Engine keeps it (`store_param_remainders`).

Sources: E4M3 and E5M2, Micikevicius et al., arXiv:2209.05433, table 1 (E4M3 without infinities);
E2M1 and E8M0, the OCP Microscaling Formats specification 1.0, sections 5.3 and 5.4.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybrid_train.precision.recipes import Element

UNIT = 2.0**-16  # what a drawn number counts
_NUMBERS_PER_WORD = 4  # of 16 bits each, in 64
_ODD_NUMBERS = 0x0001_0001_0001_0001  # the lowest bit of each number of a word
_SEED_BYTES = 24  # three words of state; the fourth is a counter
_MANTISSA = 23  # bits of float32
_EXPONENT_MASK = 0x7F800000
# Added and taken away again, it leaves float32 no room for more than whole steps.
_ROUNDER = 1.5 * 2.0**_MANTISSA
_MIN_REMAINDER, _MAX_REMAINDER = -(2**15), 2**15 - 1


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

    Zeros may lose their sign. `scratch` is like x; noise is as whole multiples of `UNIT`.
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


class Noise:
    """Draws the noise of one tensor after the other."""

    def __init__(self) -> None:
        self._place = (0, 0, 0)
        self._drawn = 0
        # Twice as fast as the generator of torch; NumPy promises that its stream never changes.
        self._words = np.random.SFC64(0)

    def start_step(self, seed: int, step: int, rank: int) -> None:
        """Begin the stream of a step."""
        self._place, self._drawn = (seed, step, rank), 0

    def draw(self, like: Tensor) -> Tensor:
        """Return random odd numbers, int16, of the shape and on the device of `like`.

        They count `UNIT`: -0.5 to 0.5, without both, as far apart as 2^-15, with a mean of zero. A
        probability is off by at most 2^-16. CPU and GPU have streams of their own.
        """
        place = ",".join(map(str, (*self._place, self._drawn)))
        self._drawn += 1
        key = hashlib.blake2b(place.encode(), digest_size=_SEED_BYTES).digest()
        count = max(1, -(-like.numel() // _NUMBERS_PER_WORD))
        words = self._on_cpu(key, count) if like.device.type == "cpu" else _on_gpu(key, count, like)
        words.bitwise_or_(_ODD_NUMBERS)
        return words.view(torch.int16)[: like.numel()].view(like.shape)

    def _on_cpu(self, key: bytes, count: int) -> Tensor:
        """Draw words after a state that a hash has mixed."""
        state = np.append(np.frombuffer(key, dtype="<u8"), np.uint64(1))
        self._words.state = {
            "bit_generator": "SFC64",
            "state": {"state": state},
            "has_uint32": 0,
            "uinteger": 0,
        }
        return torch.from_numpy(self._words.random_raw(count).view(np.int64))


def _on_gpu(key: bytes, count: int, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(key[:8]) >> 1)
    words = torch.empty(count, dtype=torch.int64, device=like.device)
    return words.random_(-(2**63), None, generator=generator)


def split_remainder(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bfloat16 next to each float32 number, away from zero in a tie, and the rest."""
    bits = master.view(torch.int32)
    weight = ((bits + 2**15) >> 16).to(torch.int16).view(torch.bfloat16)
    return weight, remainder_of(master, weight)


def join_remainder(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 number of a bfloat16 weight and a remainder, which is int16."""
    return (_raised(weight) + remainder.to(torch.int32)).view(torch.float32)


def remainder_of(master: Tensor, weight: Tensor) -> Tensor:
    """Return what the weight lacks of a master that it was rounded from.

    Where the weight was rounded by another rule, the remainder is that of the nearest number that
    this one rounds to the weight: one ulp from the master if it was a tie.
    """
    distance = master.view(torch.int32) - _raised(weight)
    return distance.clamp_(_MIN_REMAINDER, _MAX_REMAINDER).to(torch.int16)


def _raised(weight: Tensor) -> Tensor:
    return weight.view(torch.int16).to(torch.int32) << 16
