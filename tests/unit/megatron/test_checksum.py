"""A checksum sees each turned bit; tests/distributed has processes that hold other weights."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS
FORMATS = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(scope="module")
def checksum(groups: Any) -> Any:
    """Megatron must be imported behind the emulation, hence the fixture."""
    from hybrid_train.megatron.data_parallel import checksum

    return checksum


@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    dtype=st.sampled_from(FORMATS),
    data=st.data(),
)
def test_every_turned_bit_changes_the_sum(
    checksum: Any, shape: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor = torch.linspace(-3, 5, max(1, torch.Size(shape).numel())).to(dtype).reshape(shape)
    before = int(checksum(tensor))
    flat = tensor.clone().reshape(-1).view(torch.uint8)
    place = data.draw(st.integers(0, flat.numel() - 1))
    flat[place] ^= 1 << data.draw(st.integers(0, 7))
    assert int(checksum(flat.view(dtype).reshape(shape))) != before


def test_exchanged_rows_change_the_sum(checksum: Any) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert int(checksum(tensor)) != int(checksum(tensor[[1, 0, 2]]))


def test_what_is_no_number_has_a_sum_too(checksum: Any) -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0])
    assert int(checksum(tensor)) == int(checksum(tensor.clone()))
    assert int(checksum(tensor)) != int(checksum(tensor.abs()))
