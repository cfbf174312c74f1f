"""A float32 number as the bfloat16 next to it, and the 16 bits by which it differs.

Numbers of one sign lie in the order of their bits, so the bits of the float32 number are those of
the bfloat16 one, 16 places higher, plus a signed remainder. Together they take as much as the
float32 number, and the bfloat16 part is what the forward pass needs anyway: a master weight costs
two bytes more than its weight. So Transformer Engine keeps it (`store_param_remainders`).
"""

import torch
from torch import Tensor

_LEAST, _MOST = -(2**15), 2**15 - 1


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bfloat16 next to each float32 number, away from zero in a tie, and the rest."""
    bits = master.view(torch.int32)
    weight = ((bits + 2**15) >> 16).to(torch.int16).view(torch.bfloat16)
    return weight, remainder_of(master, weight)


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 number of a bfloat16 weight and a remainder, which is int16."""
    return (_raised(weight) + remainder.to(torch.int32)).view(torch.float32)


def remainder_of(master: Tensor, weight: Tensor) -> Tensor:
    """Return what the weight lacks of a master that it was rounded from.

    Where the weight was rounded by another rule, the remainder is that of the nearest number that
    this one rounds to the weight: one ulp from the master if it was a tie.
    """
    distance = master.view(torch.int32) - _raised(weight)
    return distance.clamp_(_LEAST, _MOST).to(torch.int16)


def _raised(weight: Tensor) -> Tensor:
    return weight.view(torch.int16).to(torch.int32) << 16
