"""Scales from the largest values of earlier steps."""

import pytest
import torch

from hybrid_train.precision.quantize import AmaxHistory
from hybrid_train.precision.recipes import Element
from hybrid_train.schema.precision import AmaxChoice


def scales(history: AmaxHistory, amaxes: list[float]) -> list[float]:
    """Largest value that each step's scale is for, with one tensor a step."""
    found = []
    for amax in amaxes:
        scale = history.scale(torch.tensor([[0.25, -amax]]), Element.e4m3)
        found.append(float(scale) * 448)
        history.roll(history.seen)
    return found


def test_the_first_step_takes_the_present_largest_value() -> None:
    assert scales(AmaxHistory(4, AmaxChoice.max), [7.0]) == [7.0]


@pytest.mark.parametrize(
    ("choice", "expected"),
    # Each step sees those before it; with max, a value counts for as many steps as are remembered.
    [
        (AmaxChoice.max, [7.0, 7.0, 14.0, 14.0, 14.0, 7.0]),
        (AmaxChoice.most_recent, [7.0, 7.0, 14.0, 1.75, 3.5, 7.0]),
    ],
)
def test_later_steps_take_what_earlier_ones_saw(choice: AmaxChoice, expected: list[float]) -> None:
    assert scales(AmaxHistory(3, choice), [7.0, 14.0, 1.75, 3.5, 7.0, 1.75]) == expected


def test_a_step_remembers_the_largest_of_its_tensors() -> None:
    history = AmaxHistory(2, AmaxChoice.most_recent)
    for amax in (3.5, 14.0, 7.0):
        history.scale(torch.full((2, 2), amax), Element.e4m3)
    history.roll(history.seen)
    assert float(history.scale(torch.ones(1, 1), Element.e4m3)) * 448 == 14.0
    assert float(history.seen) == 1.0


def test_what_other_ranks_saw_counts() -> None:
    history = AmaxHistory(2, AmaxChoice.max)
    history.scale(torch.ones(1, 1), Element.e5m2)
    history.roll(torch.tensor(28.0))
    assert float(history.scale(torch.ones(1, 1), Element.e5m2)) * 57344 == 28.0


def test_zeros_and_nothing_have_a_scale_of_one() -> None:
    for tensor in (torch.zeros(2, 3), torch.zeros(0, 3)):
        assert float(AmaxHistory(2, AmaxChoice.max).scale(tensor, Element.e4m3)) == 1.0
