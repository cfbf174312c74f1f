"""Layers of one width out of layers of several: sizes by hand."""

import pytest

from hybrid_train.anatomy.layers import layers
from hybrid_train.hf.padding import filled_up, one_width
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
        LayerRule(
            layers="6", moe=MoeSizes(experts=2, intermediate_size=8, shared_intermediate_size=16)
        ),
    )
    told = one_width(narrow)
    assert (told.layers, told.mlp.intermediate_size) == ([], 40)
    assert told.moe.experts == 4
    assert (told.moe.intermediate_size, told.moe.shared_intermediate_size) == (32, 48)
    assert filled_up(narrow) == {
        "mlp.intermediate_size": (24, 40),
        "moe.experts": (2, 4),
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
        (LayerRule(layers="7", mamba=MambaSizes(head_dim=8)), r"mamba\.head_dim is 8 in layer 7"),
        (LayerRule(layers="4", attention=AttentionSizes(heads=2)), r"attention\.heads .* layer 4"),
    ],
)
def test_what_zeros_cannot_fill_is_refused_by_name(rule: LayerRule, named: str) -> None:
    uneven = tiny_job("M-E*-EM*").model
    uneven.layers = [rule]
    with pytest.raises(UserError, match=rf"model\.layers\.0\.{named}|in layer 8, and .*{named}"):
        one_width(uneven)
