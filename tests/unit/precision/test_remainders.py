"""Float32 numbers as bfloat16 ones and remainders: nothing is lost, and the nearest is taken."""

import pytest
import torch
from torch import Tensor

from hybrid_train.precision.formats import (
    join_remainder,
    remainder_of,
    split_remainder,
)


def numbers() -> Tensor:
    """Of every size and both signs, with ties, zeros, denormals and the largest."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator, dtype=torch.int64)
    ties = bits[:1000] & ~0xFFFF | 0x8000
    drawn = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.3e38, -3.3e38, 1.0])
    return torch.cat([drawn[drawn.isfinite()], special])


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_weight_and_remainder_are_the_master_to_the_bit() -> None:
    master = numbers()
    weight, remainder = split_remainder(master)
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert same_bits(join_remainder(weight, remainder), master)


def test_the_weight_is_the_nearest_bfloat16_and_ties_go_away_from_zero() -> None:
    master = numbers()
    weight, _ = split_remainder(master)
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert tie.sum() > 500
    assert torch.equal(weight[~tie], master[~tie].bfloat16())
    assert (weight[tie].abs().float() > master[tie].abs()).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_master_whose_tie_went_to_zero_is_moved_by_one_ulp(sign: float) -> None:
    master = torch.tensor([sign * (1 + 2**-8)])  # half way from 1 to the next bfloat16
    weight = master.bfloat16()  # torch's rule: to even, here to zero
    assert weight.item() == sign
    found = join_remainder(weight, remainder_of(master, weight))
    assert found.item() == sign * (1 + 2**-8 - 2**-23)
    assert torch.equal(split_remainder(found)[0], weight)


def test_a_remainder_never_leaves_what_rounds_to_the_weight() -> None:
    weight, other = torch.tensor([1.0]).bfloat16(), torch.tensor([1.5, 0.3])
    for master in other.split(1):
        found = join_remainder(weight, remainder_of(master, weight))
        assert torch.equal(split_remainder(found)[0], weight)
