"""Random bits for rounding by chance, from a counter: there is no state to save.

The n-th tensor of a step gets what seed, step, rank and n say, so that a resumed run rounds like
one that never stopped.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

UNIT = 2.0**-16  # what a drawn number counts
_PER_WORD = 4  # numbers in 64 bits
_ODD = 0x0001_0001_0001_0001
_SEED_BYTES = 24  # three words of state; the fourth is a counter


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
        count = max(1, -(-like.numel() // _PER_WORD))
        words = self._on_cpu(key, count) if like.device.type == "cpu" else _on_gpu(key, count, like)
        words.bitwise_or_(_ODD)
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
