"""What no child can be, each with the nearest legal value; and what a child rules out for later."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from omegaconf import OmegaConf

from hybrid_train.anatomy.counts import parameters
from hybrid_train.compression.child_sizes import child_model, plan_of
from hybrid_train.compression.cut_rules import depth_problems, multiple_of, remarks, size_problems
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.pruning import Cut
from tests.tiny import tiny_job

PARENT = tiny_job().model  # MEM*M-/*E/*E
WHOLE = range(1, 7)


def cut_of(*lines: str) -> Cut:
    """A cut as it is typed."""
    merged = OmegaConf.merge(OmegaConf.structured(Cut), OmegaConf.from_dotlist(list(lines)))
    cut: Any = OmegaConf.to_object(merged)
    assert isinstance(cut, Cut)
    return cut


def problems(cut: Cut, parent: Model = PARENT) -> list[Problem]:
    plan = plan_of(parent, cut, WHOLE)
    return [*depth_problems(parent, cut), *size_problems(parent, plan, multiple_of(cut))]


# what is typed -> the path that is refused, the nearest value, a word of the rule
REFUSED: list[tuple[str, str, object, str]] = [
    ("model.hidden_size=64", "model.hidden_size", 32, "makes nothing larger"),
    ("model.hidden_size=21", "model.hidden_size", 24, "multiple of 8"),
    ("model.hidden_size=3", "model.hidden_size", 8, "multiple of 8"),
    ("model.mlp.intermediate_size=63", "model.mlp.intermediate_size", 64, "multiple of 8"),
    ("model.mamba.heads=3", "model.mamba.heads", 2, "mamba.groups (2)"),
    ("model.mamba.heads=1", "model.mamba.heads", 2, "heads stay in their groups"),
    ("model.mamba.heads=6", "model.mamba.heads", 4, "makes nothing larger"),
    ("model.mamba.head_dim=12", "model.mamba.head_dim", 8, "multiple of 8"),
    ("model.attention.heads=3", "model.attention.heads", 2, "attention.kv_heads (2)"),
    ("model.attention.kv_heads=3", "model.attention.kv_heads", 2, "makes nothing larger"),
    ("model.moe.experts=1", "model.moe.experts", 2, "experts of a token"),
    ("model.moe.experts=5", "model.moe.experts", 4, "makes nothing larger"),
    ("model.moe.intermediate_size=30", "model.moe.intermediate_size", 32, "multiple of 8"),
    ("model.moe.shared_intermediate_size=44", "model.moe.shared_intermediate_size", 40, "of 8"),
    ("model.moe.latent_size=17", "model.moe.latent_size", 16, "makes nothing larger"),
    ("depth.layers=6", "depth.layers", 5, "less than 6"),
    ("depth.block=9", "depth.block", 5, "less than 6"),
    ("depth.mamba=4", "depth.mamba", 3, "Mamba-2 layers of the parent"),
    ("depth.drop=[7]", "depth.drop.0", "6", "6 main layers"),
    ("depth.drop=[all]", "depth.drop", None, "leaves no layer"),
    ("depth.keep=[2,4-9]", "depth.keep.1", None, "6 main layers"),
    ("depth.together=2", "depth.together", 1, "the pattern repeats them"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "path", "nearest", "word"), REFUSED)
def test_what_no_child_can_be_is_refused_with_the_nearest_that_one_can(
    line: str, path: str, nearest: object, word: str
) -> None:
    (found,) = problems(cut_of(line))
    assert (found.path, found.nearest) == (path, nearest)
    assert word in found.rule
    if nearest is not None:
        key = line.partition("=")[0]
        legal = f"[{nearest}]" if "[" in line else nearest
        assert not problems(cut_of(f"{key}={legal}"))


def test_heads_of_a_group_that_stays_are_at_most_those_that_it_has() -> None:
    (found,) = problems(cut_of("model.attention.kv_heads=1", "model.attention.heads=4"))
    assert (found.path, found.nearest) == ("model.attention.heads", 2)


DENSE = replace(PARENT, pattern="*-" * 4)


@pytest.mark.parametrize(
    ("lines", "path", "nearest", "word"),
    [
        (["depth.drop=[5]"], "depth.drop.0", "4", "4 groups of 2 main layers"),
        (["depth.layers=4"], "depth.layers", 3, "4 groups of 2 main layers"),
        (["depth.block=7"], "depth.block", 3, "4 groups of 2 main layers"),
        (["depth.together=3", "depth.layers=2"], "depth.together", 2, "2 of *-*-*-"),
        (["depth.together=5", "depth.layers=2"], "depth.together", 4, "2 of *-*-*-"),
    ],
)
def test_groups_of_layers_are_counted_as_groups(
    lines: list[str], path: str, nearest: object, word: str
) -> None:
    (found,) = problems(cut_of("depth.together=2", *lines), DENSE)
    assert (found.path, found.nearest) == (path, nearest)
    assert word in found.rule


def test_all_problems_are_told_at_once() -> None:
    found = problems(cut_of("model.hidden_size=40", "model.mamba.heads=3", "depth.layers=9"))
    assert {one.path for one in found} == {
        *("model.hidden_size", "model.mamba.heads", "depth.layers")
    }


@pytest.mark.parametrize(
    ("rule", "path", "word"),
    [
        ("{layers: '1', mamba: {heads: 3}}", "model.layers.0.mamba.heads", "groups"),
        ("{layers: '2', mamba: {heads: 2}}", "model.layers.0", "no layer that stays"),
        ("{layers: all}", "model.layers.0", "gives no size"),
        ("{layers: '6', mlp: {intermediate_size: 72}}",
         "model.layers.0.mlp.intermediate_size", "larger"),
    ],
)  # fmt: skip
def test_sizes_of_some_layers_are_held_to_the_same_rules(rule: str, path: str, word: str) -> None:
    loaded = OmegaConf.merge(
        OmegaConf.structured(Cut), OmegaConf.create(f"model: {{layers: [{rule}]}}")
    )
    cut_with: Any = OmegaConf.to_object(loaded)
    (found,) = problems(cut_with)
    assert found.path == path
    assert word in found.rule


def test_what_the_parent_does_not_have_is_refused() -> None:
    dense = tiny_job("M*-M-*").model
    for line in ("model.moe.experts=2", "mtp=drop", "depth.moe=1"):
        (found,) = problems(cut_of(line), dense)
        assert found.path == line.partition("=")[0]


def test_a_multiple_of_ones_own_takes_any_size() -> None:
    assert not problems(cut_of("model.hidden_size=21", "multiple=1"))


def child_of(*lines: str) -> Model:
    cut = cut_of(*lines)
    return child_model(PARENT, plan_of(PARENT, cut, WHOLE))


def test_a_layout_or_format_that_takes_the_parent_alone_is_named() -> None:
    parent = copy.deepcopy(PARENT)  # hidden 32, 4 experts
    assert not list(remarks(parent, parent))
    (expert,) = remarks(parent, child_of("model.moe.experts=3"))
    assert "parallel.expert=2" in expert
    assert "model.moe.experts (3)" in expert
    (format,) = remarks(parent, child_of("model.hidden_size=24"))
    assert "multiples of 16" in format
    assert "model.hidden_size=24" in format
    tensor, _ = remarks(parent, child_of("model.mlp.intermediate_size=63", "multiple=1"))
    assert "parallel.tensor=2" in tensor
    assert not list(remarks(parent, child_of("model.mamba.head_dim=8")))


def test_a_child_without_experts_has_none_to_spread() -> None:
    cut = cut_of("mtp=drop", "depth.drop=[2]")
    child = child_model(PARENT, plan_of(PARENT, cut, (1, 3, 4, 5, 6)))
    assert "E" not in child.pattern
    assert not list(remarks(PARENT, child))


def test_a_child_is_smaller_by_what_was_asked() -> None:
    whole = parameters(PARENT, 64).total
    neurons = 48  # of 64, in one MLP layer: a row and a column of hidden each
    child = child_of(f"model.mlp.intermediate_size={neurons}")
    assert whole - parameters(child, 64).total == 2 * 32 * (64 - neurons)
