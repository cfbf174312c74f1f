"""The bits of stochastic rounding: the same for the same place, others elsewhere, uniform."""

import pytest
import torch
from torch import Tensor

from hybrid_train.precision.formats import UNIT, Noise

LIKE = torch.empty(64, 63)  # no multiple of the numbers in a word


def drawn(seed: int, step: int, rank: int, number: int) -> Tensor:
    noise = Noise()
    noise.start_step(seed, step, rank)
    for _ in range(number):
        noise.draw(torch.empty(5))
    return noise.draw(LIKE)


def test_the_same_place_has_the_same_bits_whatever_was_drawn_before() -> None:
    noise = Noise()
    noise.start_step(1, 1, 1)
    noise.draw(torch.empty(1000, 3))
    noise.start_step(1, 2, 3)
    noise.draw(torch.empty(7))
    assert torch.equal(noise.draw(LIKE), drawn(1, 2, 3, 1))


@pytest.mark.parametrize(
    "place", [(2, 2, 3, 1), (1, 3, 3, 1), (1, 2, 4, 1), (1, 2, 3, 0), (12, 3, 1, 1)]
)
def test_another_seed_step_rank_or_number_has_other_bits(place: tuple[int, ...]) -> None:
    equal = (drawn(*place) == drawn(1, 2, 3, 1)).sum()
    # 4032 pairs agree with a chance of 2^-15 each.
    assert equal < 6


def test_numbers_are_odd_uniform_and_symmetric() -> None:
    numbers = Noise().draw(torch.empty(1 << 21))
    assert numbers.dtype == torch.int16
    assert (numbers % 2 != 0).all()
    values = numbers.double() * UNIT
    assert values.abs().max() < 0.5
    # Standard errors of the mean and of the variance of uniform numbers.
    count = len(values)
    assert values.mean().abs() < 5 * (1 / 12 / count) ** 0.5
    assert (values.var() - 1 / 12).abs() < 5 * (1 / 180 / count) ** 0.5
    # Each of the 32 highest parts holds count / 32, with a binomial deviation.
    parts = torch.histc(values, 32, -0.5, 0.5)
    assert (parts - count / 32).abs().max() < 5 * (count / 32) ** 0.5


def test_neighbours_have_nothing_to_do_with_each_other() -> None:
    values = Noise().draw(torch.empty(1 << 20)).double() * UNIT * 12**0.5
    for apart in (1, 2, 3, 4, 5, 64):
        assert (values[apart:] * values[:-apart]).mean().abs() < 5 / 2**10


@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (3, 5)])
def test_small_tensors_have_noise_of_their_shape(shape: tuple[int, int]) -> None:
    assert Noise().draw(torch.empty(shape)).shape == shape


def test_the_stream_is_that_of_earlier_runs() -> None:
    # A run that is resumed with another version of NumPy must round as before.
    noise = Noise()
    noise.start_step(1, 2, 3)
    assert noise.draw(torch.empty(6)).tolist() == [6075, -8019, 16599, 18195, 6571, -9527]
