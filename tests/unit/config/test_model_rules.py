"""What the parts of a model make of each other: gates, norms of heads, positions, factors."""

import pytest

from hybrid_train.config.compose import compose
from hybrid_train.config.rules_of_model import MODEL_RULES, rows_take_one_list
from hybrid_train.schema.problems import ConfigError
from tests.unit.config.test_checks import broken, edited

DENSE = "model.pattern=*-*-"
ROPE = f"{DENSE} model.attention.rope.theta=10000"
ONES = "[" + ",".join(["1"] * 8) + "]"  # a head of the tiny run has 16 channels
LONG = (
    f"{ROPE} model.attention.rope.scaling=longrope model.attention.rope.original_length=16 "
    f"model.attention.rope.short_factors={ONES} model.attention.rope.long_factors={ONES}"
)
# overrides on the tiny run, path, part of the rule, nearest legal value
CASES = [
    ("model.mlp.gated=true", "model.mlp.gated", "expert layers (E)", "false"),
    ("model.pattern=E* model.mlp.gated=true", "model.mlp.gated", "expert layers (E)", "false"),
    ("model.mlp.activation=silu", "model.mlp.activation", "must be squared_relu", "squared_relu"),
    (
        f"{DENSE} model.attention.qk_norm=true model.norm=layer_1p",
        "model.attention.qk_norm", "needs model.norm=rms", "false",
    ),
    (
        "model.pattern=M- model.attention.rope.theta=10000",
        "model.attention.rope.theta", "no attention layers", "null",
    ),
    (
        f"{ROPE} model.attention.rope.fraction=0.5625",
        "model.attention.rope.fraction", "turns 9 of the 16 channels", "0.5",
    ),
    (
        f"{ROPE} model.attention.rope.fraction=0.01",
        "model.attention.rope.fraction", "turns 0 of the 16 channels", "0.125",
    ),
    (
        f"{LONG} model.attention.rope.fraction=0.75",
        "model.attention.rope.long_factors", "has 8; must have 6, one for each pair", None,
    ),
    (
        f"{ROPE} model.attention.rope.scaling=longrope",
        "model.attention.rope.short_factors", "has 0; must have 8", None,
    ),
    (
        f"{LONG} data.packing=best_fit",
        "train.sequence_length", "rope.original_length (16) where documents are packed", "16",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "path", "rule", "legal"), CASES)
def test_parts_that_do_not_go_together_are_refused_with_the_nearest_that_do(
    lines: str, path: str, rule: str, legal: str | None
) -> None:
    given = lines.split()
    (found,) = [one for one in broken(given, 1) if one.path == path]
    assert rule in found.rule
    assert (None if legal is None else str(found.nearest)) == legal
    if legal is not None:
        mended = broken([*given, f"{path}={found.nearest}"], 1)
        assert not [one for one in mended if one.path == path]


def test_every_rule_of_a_model_has_a_case_that_breaks_it() -> None:
    rules = {*MODEL_RULES, rows_take_one_list}
    for lines, *_ in CASES:
        job = edited(*lines.split())
        rules -= {rule for rule in rules if list(rule(job, 1))}
    assert {rule.__name__ for rule in rules} == {"layer_rules_decide"}  # test_layout_rules.py


@pytest.mark.parametrize(
    "lines",
    [
        f"{DENSE} model.mlp.gated=true model.mlp.activation=silu model.attention.qk_norm=true",
        f"{DENSE} model.norm=layer_1p model.attention.qkv_bias=true",
        "model.norm=layer_1p",  # with Mamba, experts and MTP
        f"{ROPE} model.attention.rope.fraction=0.125",
        f"{LONG} model.attention.rope.original_length=64 data.packing=best_fit",
        LONG,  # rows of one document each
        "model.pattern=M- model.attention.rope.fraction=0.01",  # nothing is turned
    ],
)
def test_parts_that_go_together_are_accepted(lines: str) -> None:
    assert broken(lines.split(), 1) == []


def test_a_count_is_held_to_the_same_rules() -> None:
    with pytest.raises(ConfigError, match=r"long_factors = .*must have 48, one for each pair"):
        compose("count", ["model=phi4_mini", "model.attention.rope.long_factors=[1,2]"])
