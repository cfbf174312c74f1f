"""Random bits for rounding by chance, from a counter: there is no state to save.

The n-th tensor of a step gets what seed, step, rank and n say, so that a resumed run rounds like
one that never stopped.
"""

import hashlib

import torch
from torch import Tensor

_PER_WORD = 4  # 16 random bits a value: a probability is off by at most 2^-17


class Noise:
    """Draws the noise of one tensor after the other."""

    def __init__(self) -> None:
        self._place = (0, 0, 0)
        self._drawn = 0

    def start_step(self, seed: int, step: int, rank: int) -> None:
        """Begin the stream of a step."""
        self._place, self._drawn = (seed, step, rank), 0

    def draw(self, like: Tensor) -> Tensor:
        """Return uniform float32 numbers in (-0.5, 0.5), of the shape and on the device of `like`.

        CPU and GPU have streams of their own.
        """
        place = ",".join(map(str, (*self._place, self._drawn)))
        self._drawn += 1
        key = hashlib.blake2b(place.encode(), digest_size=8).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(key) >> 1)
        words = torch.empty(
            -(-like.numel() // _PER_WORD), dtype=torch.int64, device=like.device
        ).random_(-(2**63), None, generator=generator)
        bits = words.view(torch.int16)[: like.numel()].view(like.shape)
        return bits.to(torch.float32).add_(0.5).mul_(2.0**-16)


NOISE = Noise()
