"""The model section of a child says what its layers are, with as few rules as can be."""

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.kinds import CHOSEN
from hybrid_train.anatomy.layers import layers
from hybrid_train.compression.child_sizes import Plan, child_layers, child_model
from hybrid_train.schema.model import LayerRule, MambaSizes, MlpSizes, Model, MoeSizes
from tests.tiny import tiny_job


def along(model: Model, letter: str, axis: Axis) -> list[int]:
    """Sizes of all layers of a kind, MTP blocks last."""
    return [one.sizes.along(axis) for one in layers(model) if one.letter == letter]


def test_layers_in_a_row_share_a_rule_and_the_usual_size_needs_none() -> None:
    parent = tiny_job("M-M-M-M-M-").model
    rules = [
        LayerRule(layers="5-8", mlp=MlpSizes(intermediate_size=16), mamba=MambaSizes(heads=2)),
        LayerRule(layers="all", mlp=MlpSizes(intermediate_size=48)),
    ]
    child = child_model(parent, Plan(tuple(range(1, 11)), mtp=False, sizes={}, rules=rules))
    assert along(child, "-", Axis.ffn) == [48, 48, 16, 16, 48]
    assert along(child, "M", Axis.ssm_heads) == [4, 4, 2, 2, 4]
    assert child.mlp.intermediate_size == 48
    assert [str(rule) for rule in child.layers] == [
        "5-7: mamba.heads 2", "6-8: mlp.intermediate_size 16",
    ]  # fmt: skip


def test_rules_count_in_the_child_after_layers_went() -> None:
    parent = tiny_job("M-M-M-M-").model
    rules = [LayerRule(layers="8", mlp=MlpSizes(intermediate_size=16))]
    plan = Plan((1, 2, 6, 8), mtp=False, sizes={Axis.ffn: 32}, rules=rules)
    child = child_model(parent, plan)
    assert child.pattern == "M---"
    assert along(child, "-", Axis.ffn) == [32, 32, 16]
    assert [rule.layers for rule in child.layers] == ["4"]


def test_a_block_has_the_size_of_its_kind_though_most_main_layers_have_another() -> None:
    parent = tiny_job("MEME/*E/*E").model
    rules = [LayerRule(layers="2-4", moe=MoeSizes(experts=2))]
    plan = Plan((1, 2, 3, 4), mtp=True, sizes={Axis.experts: 3}, rules=rules)
    child = child_model(parent, plan)
    assert along(child, "E", Axis.experts) == [2, 2, 3]
    every = [LayerRule(layers="all", moe=MoeSizes(experts=2))]
    child = child_model(parent, Plan((1, 2, 3, 4), mtp=True, sizes={}, rules=every))
    assert along(child, "E", Axis.experts) == [2, 2, 2]
    assert not child.layers


def test_the_child_of_an_uneven_parent_keeps_what_is_smaller() -> None:
    parent = tiny_job("M-M-").model
    parent.layers = [LayerRule(layers="last 1", mlp=MlpSizes(intermediate_size=24))]
    child = child_model(parent, Plan((1, 2, 3, 4), mtp=False, sizes={Axis.ffn: 40}))
    assert along(child, "-", Axis.ffn) == [40, 24]


def test_layers_of_the_section_and_of_the_plan_are_the_same() -> None:
    parent = tiny_job().model
    rules = [LayerRule(layers="2", moe=MoeSizes(experts=2, intermediate_size=8))]
    sizes = {Axis.hidden: 16, Axis.latent: 8, Axis.kv_groups: 1}
    plan = Plan((1, 2, 4), mtp=True, sizes=sizes, rules=rules)
    told = [(one.letter, own) for one, own in child_layers(parent, plan)]
    child = layers(child_model(parent, plan))
    assert [one.letter for one in child] == [letter for letter, _ in told]
    for one, (letter, wanted) in zip(child, told, strict=True):
        for axis in (Axis.hidden, *CHOSEN[letter]):
            assert one.sizes.along(axis) == wanted.along(axis), axis
    assert (child[2].sizes.kv_groups, child[2].sizes.heads) == (1, 2), "heads go with their group"
