"""Small floats against torch's own types, and stochastic rounding against its definition."""

import itertools

import pytest
import torch
from torch import Tensor

from hybrid_train.precision.formats import (
    GRIDS,
    UNIT,
    Noise,
    decode,
    encode,
    round_to,
    round_to_,
)
from hybrid_train.precision.recipes import Element
from tests.sampled import sampled

TYPES = {Element.e4m3: torch.float8_e4m3fn, Element.e5m2: torch.float8_e5m2}
# OCP Microscaling Formats specification 1.0, table 2 of section 5.3.3.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def grid(element: Element) -> Tensor:
    """All finite values in order."""
    values = decode(torch.arange(16 if element is Element.e2m1 else 256), element)
    return values[values.isfinite()].unique()


def in_range(element: Element) -> Tensor:
    """Random patterns of bits, normal numbers, all values, all ties and their neighbours."""
    values = grid(element)
    ties = (values[1:] + values[:-1]) / 2
    bits = torch.randint(-(2**31), 2**31 - 1, (500_000,)).to(torch.int32).view(torch.float32)
    normal = torch.randn(200_000) * torch.exp(6 * torch.randn(200_000))
    up, down = (torch.nextafter(ties, torch.full_like(ties, to)) for to in (torch.inf, -torch.inf))
    x = torch.cat([bits, normal, values, ties, up, down, torch.tensor([0.0, -0.0, 1e-45, -1e-45])])
    return x[x.abs() <= GRIDS[element].largest]


@pytest.mark.parametrize("element", TYPES)
def test_every_code_has_the_value_that_torch_gives_it(element: Element) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(TYPES[element]).to(torch.float32)
    # Infinities and NaN of E5M2 are no values of a quantized tensor: both are NaN here.
    theirs = theirs.masked_fill(theirs.isinf(), torch.nan)
    torch.testing.assert_close(decode(codes, element), theirs, rtol=0, atol=0, equal_nan=True)
    finite = theirs.isfinite()
    assert torch.equal(encode(theirs[finite], element), codes[finite])


def test_the_sixteen_codes_of_e2m1_have_the_values_of_the_specification() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode(codes, Element.e2m1)
    assert values.tolist() == E2M1 + [-value for value in E2M1]
    assert torch.equal(encode(values, Element.e2m1), codes)


@pytest.mark.parametrize("element", TYPES)
def test_rounding_is_the_cast_of_torch_to_the_bit(element: Element) -> None:
    x = in_range(element)
    theirs = x.to(TYPES[element])
    ours = round_to(x, element)
    assert torch.equal(ours.view(torch.int32), theirs.to(torch.float32).view(torch.int32))
    assert torch.equal(encode(ours, element), theirs.view(torch.uint8))


@pytest.mark.parametrize("element", sampled(Element, Element.e2m1))
def test_a_value_goes_to_the_nearest_and_a_tie_to_the_even_code(element: Element) -> None:
    values = grid(element)
    x = in_range(element)
    distance = (x.double()[:, None] - values.double()).abs()
    nearest = distance.amin(1)
    ours = round_to(x, element)
    assert torch.equal((x.double() - ours.double()).abs(), nearest)
    is_tie = (distance == nearest[:, None]).sum(1) == 2
    assert is_tie.sum() >= len(values) - 1
    assert not (encode(ours[is_tie], element) & 1).any()


@pytest.mark.parametrize("element", Element)
def test_what_is_beyond_the_largest_value_becomes_that_and_nan_stays(element: Element) -> None:
    largest = GRIDS[element].largest
    x = torch.tensor([largest * 1.2, 3e38, torch.inf, -torch.inf, torch.nan])
    expected = torch.tensor([largest, largest, largest, -largest, torch.nan])
    torch.testing.assert_close(round_to(x, element), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("element", Element)
def test_rounding_twice_changes_nothing(element: Element) -> None:
    once = round_to(in_range(element), element)
    assert torch.equal(round_to(once, element), once)
    assert torch.equal(
        encode(decode(encode(once, element), element), element), encode(once, element)
    )


@pytest.mark.parametrize(("element", "stochastic"), itertools.product(Element, (False, True)))
def test_rounding_in_place_has_the_same_values(element: Element, stochastic: bool) -> None:
    x = in_range(element)
    noise = Noise().draw(x).to(torch.float32) if stochastic else None
    expected = round_to(x, element, None if noise is None else noise * UNIT)
    assert torch.equal(round_to_(x.clone(), element, torch.empty_like(x), noise), expected)


@pytest.mark.parametrize("element", Element)
def test_chance_never_leaves_the_two_neighbours(element: Element) -> None:
    values = grid(element)
    x = in_range(element)
    below = values[torch.searchsorted(values, x, right=True) - 1]
    above = values[torch.searchsorted(values, x)]
    extremes = (torch.full_like(x, sign * (1 - 2**-15) / 2) for sign in (-1, 1))
    for noise in (*extremes, Noise().draw(x).to(torch.float32) * UNIT):
        rounded = round_to(x, element, noise)
        assert ((rounded == below) | (rounded == above)).all()
    assert torch.equal(round_to(values, element, Noise().draw(values) * UNIT), values)


@pytest.mark.parametrize("element", Element)
def test_the_mean_of_many_draws_is_the_value(element: Element) -> None:
    draws, noise = 20_000, Noise()
    # Of each magnitude of the element some, subnormal ones included.
    values = grid(element)
    between = torch.rand(40) * values[values > 0][torch.linspace(0, 6, 40).long()]
    x = torch.cat([between, -between, between / between.max() * values[-1]]).clamp_max(values[-1])
    many = x.expand(draws, -1)
    mean = round_to(many, element, noise.draw(many).to(torch.float32) * UNIT).double().mean(0)
    index = torch.searchsorted(values, x)
    step = (values[index] - values[(index - 1).clamp_min(0)]).double()
    # A draw lies within one step: by Hoeffding 2 exp(-2 n t^2) < 1e-9 / 120 beyond t steps; a
    # probability is off by up to 2^-16.
    bound = (torch.tensor(2 * len(x) / 1e-9).log() / (2 * draws)).sqrt() + 2.0**-16
    assert ((mean - x.double()).abs() <= bound * step).all()
