"""Layers with sizes of their own: which rule holds, and what follows from it."""

import dataclasses

import pytest

from hybrid_train.anatomy import counts
from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import Layer, layers, main_layers, stored_tensors
from hybrid_train.hf.families.nemotron_h import NEMOTRON_H
from hybrid_train.planning.stages import layer_costs
from hybrid_train.schema.model import LayerRule, MambaSizes, MlpSizes, Model, MoeSizes
from tests.tiny import tiny_job


def with_rules(pattern: str, *rules: LayerRule) -> Model:
    model = tiny_job(pattern).model
    model.layers = list(rules)
    return model


def mlp(layers: str, width: int) -> LayerRule:
    return LayerRule(layers=layers, mlp=MlpSizes(intermediate_size=width))


def widths(found: tuple[Layer, ...] | list[Layer]) -> list[int]:
    return [layer.sizes.ffn for layer in found]


def test_the_first_rule_with_sizes_for_a_kind_of_layer_holds() -> None:
    wide = LayerRule(layers="all", mamba=MambaSizes(heads=8))  # has nothing to say of MLP layers
    model = with_rules("----", wide, mlp("2-3", 96), mlp("3-4", 32))
    assert widths(layers(model)) == [64, 96, 96, 32]


def test_only_all_reaches_into_mtp_blocks() -> None:
    assert widths(layers(with_rules("--/-", mlp("1-2", 96)))) == [96, 96, 64]
    assert widths(layers(with_rules("--/-", mlp("all", 96)))) == [96, 96, 96]


def test_a_layer_names_the_setting_of_each_of_its_sizes() -> None:
    rule = LayerRule(layers="2", moe=MoeSizes(experts=8))
    first, second = main_layers(with_rules("EE", mlp("all", 96), rule))
    assert first.setting(Axis.experts) == "model.moe.experts"
    assert second.setting(Axis.experts) == "model.layers.1.moe.experts"
    assert second.setting(Axis.expert_ffn) == "model.moe.intermediate_size"


def test_counts_of_unequal_layers_are_those_of_the_models_they_are_from() -> None:
    """Of every kind one layer has other sizes: half of each of two models with equal layers."""
    pattern = "MME*--E*"
    rules = [
        LayerRule(layers="first 1", mamba=MambaSizes(heads=8, head_dim=32)),
        mlp("5", 96),
        LayerRule(layers="3", moe=MoeSizes(experts=8, intermediate_size=24)),
    ]
    mixed, usual = with_rules(pattern, *rules), with_rules(pattern)
    other = dataclasses.replace(
        usual,
        mamba=dataclasses.replace(usual.mamba, heads=8, head_dim=32),
        mlp=dataclasses.replace(usual.mlp, intermediate_size=96),
        moe=dataclasses.replace(usual.moe, experts=8, intermediate_size=24),
    )
    three = [counts.parameters(model, 64) for model in (mixed, usual, other)]
    for letter in "M-E*":
        found, one, two = (count.by_kind[letter] for count in three)
        assert 2 * found == one + two
        found, one, two = (count.active_by_kind[letter] for count in three)
        assert 2 * found == one + two
    found, one, two = (
        counts.flops_per_token(model, 64, 16).forward for model in (mixed, usual, other)
    )
    assert 2 * found == one + two


def test_stages_are_cut_by_the_cost_of_each_layer() -> None:
    job = tiny_job("----")
    job.model.layers = [mlp("1", 640)]
    costs = layer_costs(job, 64)
    assert costs[0] == 10 * costs[1] == 10 * costs[2]


@pytest.mark.parametrize("tied", [False, True], ids="tied={}".format)
def test_stored_tensors_are_those_that_the_table_of_names_has(tied: bool) -> None:
    model = with_rules("MEM*M-/*E/*E", mlp("6", 96))
    model.tie_embeddings = tied
    expected = {one.key: one.shape for one in NEMOTRON_H.table(model, 61)}
    assert {one.key: one.shape for one in stored_tensors(model, 64)} == expected
    assert "decoder.layers.0.mixer.in_proj.weight.dt" in expected
    assert expected["decoder.layers.5.mlp.linear_fc1.weight"] == (96, 32)
