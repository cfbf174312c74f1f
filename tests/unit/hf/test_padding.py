"""Layers of one width out of layers of several: sizes by hand, tensors by zeros."""

import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.layers import layers
from hybrid_train.hf.padding import Padded, filled_up, one_width
from hybrid_train.schema.model import (
    AttentionSizes,
    LayerRule,
    MambaSizes,
    MlpSizes,
    Model,
    MoeSizes,
)
from hybrid_train.schema.problems import UserError
from tests.tiny import tiny_job


def model(*rules: LayerRule) -> Model:
    found = tiny_job("M-E*-E").model
    found.layers = list(rules)
    return found


def test_every_layer_of_a_kind_gets_the_widest_of_them() -> None:
    narrow = model(
        LayerRule(layers="2", mlp=MlpSizes(intermediate_size=24)),
        LayerRule(layers="5", mlp=MlpSizes(intermediate_size=40)),
        LayerRule(layers="6", moe=MoeSizes(intermediate_size=8, shared_intermediate_size=16)),
    )
    told = one_width(narrow)
    assert (told.layers, told.mlp.intermediate_size) == ([], 40)
    assert (told.moe.intermediate_size, told.moe.shared_intermediate_size) == (32, 48)
    assert filled_up(narrow) == {
        "mlp.intermediate_size": (24, 40),
        "moe.intermediate_size": (8, 32),
        "moe.shared_intermediate_size": (16, 48),
    }
    assert narrow.layers


def test_rules_that_give_all_layers_one_size_are_that_size() -> None:
    same = model(LayerRule(layers="all", mamba=MambaSizes(heads=2)))
    assert one_width(same).mamba.heads == 2
    assert {one.sizes for one in layers(one_width(same))} == {layers(same)[0].sizes}
    assert filled_up(same) == {}


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (LayerRule(layers="6", moe=MoeSizes(experts=2)), r"moe\.experts is 2 in layer 6"),
        (LayerRule(layers="7", mamba=MambaSizes(head_dim=8)), r"mamba\.head_dim is 8 in layer 7"),
        (LayerRule(layers="4", attention=AttentionSizes(heads=2)), r"attention\.heads .* layer 4"),
    ],
)
def test_what_zeros_cannot_fill_is_refused_by_name(rule: LayerRule, named: str) -> None:
    uneven = tiny_job("M-E*-EM*").model
    uneven.layers = [rule]
    with pytest.raises(UserError, match=rf"model\.layers\.0\.{named}|in layer 8, and .*{named}"):
        one_width(uneven)


class Held:
    """One tensor."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def shape(self, _: str) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dtype(self, _: str) -> torch.dtype:
        return self.values.dtype

    def where(self, name: str) -> str:
        return name

    def read(self, _: str, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= len(self.values)
        return self.values[start:stop]


@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (3, 4), (5, 4)])
def test_zeros_stand_behind_rows_and_columns_whatever_rows_are_read(
    shape: tuple[int, ...],
) -> None:
    values = torch.arange(1.0, 7.0).view(3, 2)
    side = Padded(Held(values), {"x": shape})
    expected = torch.zeros(shape)
    expected[:3, :2] = values
    for start in range(shape[0]):
        for stop in range(start + 1, shape[0] + 1):
            assert torch.equal(side.read("x", start, stop), expected[start:stop])


def test_neurons_of_experts_are_filled_up_in_each_of_them() -> None:
    values = torch.arange(1.0, 13.0).view(2, 3, 2)
    wide = Padded(Held(values), {"x": (2, 5, 2)}).read("x", 0, 2)
    assert torch.equal(wide[:, :3], values)
    assert not wide[:, 3:].any()
