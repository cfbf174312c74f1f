"""A fixed random Hadamard transform of 16 neighbours, which spreads outliers over them.

T = diag(signs) H / 4 is orthogonal: turned on both sides, a product stays what it is.

Source: arXiv:2509.25149, section 3; the signs are those of Transformer Engine 2.20
(`get_wgrad_sign_vector`), the same for all layers and steps.
"""

from functools import cache

import torch
from torch import Tensor

SIZE = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@cache
def matrix(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return T, [16, 16]; a row vector is turned by x T."""
    h = torch.ones(1, 1)
    while h.shape[0] < SIZE:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (torch.tensor(SIGNS)[:, None] * h / 4).to(device, dtype)


def turn(x: Tensor, axis: int) -> Tensor:
    """Turn each 16 neighbours along an axis of a matrix whose length there is a multiple of 16.

    Returns:
        float32 (float64 if x is); of a bfloat16 matrix rounded to bfloat16, as hardware hands it
        on to quantization.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    t = matrix(x.device, kind)
    if axis == 1:
        turned = (x.to(kind).reshape(-1, SIZE) @ t).view(x.shape)
    else:
        groups = x.to(kind).reshape(x.shape[0] // SIZE, SIZE, x.shape[1])
        turned = torch.matmul(t.T, groups).view(x.shape)
    return turned.to(torch.bfloat16).to(kind) if x.dtype == torch.bfloat16 else turned
