"""The state of every generator, there and back."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS


def draws() -> list[float]:
    """Numbers of all kinds that each generator makes."""
    python = [random.random(), random.gauss(0, 1), random.randrange(10**6)]
    numpy = [np.random.rand(), np.random.randn(), float(np.random.randint(10**6))]
    return [*python, *numpy, *torch.randn(3).tolist()]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_restored_generators_go_on_as_they_would_have(groups: Any, before: int) -> None:
    """Normal numbers come in pairs: after an odd count the second one waits in the state."""
    from hybrid_train.runtime.start import random_state, restore_random_state

    for _ in range(before):
        draws()
    state = {name: tensor.clone() for name, tensor in random_state().items()}
    expected = draws()
    draws()
    restore_random_state(state)
    assert draws() == expected


def test_restored_state_is_the_saved_one_to_the_bit(groups: Any) -> None:
    from hybrid_train.runtime.start import random_state, restore_random_state

    draws()
    saved = random_state()
    exact = random.getstate()
    draws()
    restore_random_state(saved)
    assert random.getstate() == exact
    assert all(torch.equal(value, saved[name]) for name, value in random_state().items())
