"""What stays of a parent: by hand, planted, and counted to the unit."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hybrid_train.anatomy.axes import Axis, sizes_of
from hybrid_train.anatomy.counts import parameters
from hybrid_train.anatomy.kinds import EMBEDDING, HEAD, Parameter
from hybrid_train.anatomy.layers import layers, mtp_blocks
from hybrid_train.anatomy.selection import Selection, of_expert, tensor_positions
from hybrid_train.compression.choosing import Chosen, choose
from hybrid_train.compression.ranking import HIDDEN, NOT_MEASURED, Ranking, name_of
from hybrid_train.schema.model import (
    AttentionSizes,
    LayerRule,
    MambaSizes,
    MlpSizes,
    Model,
    MoeSizes,
)
from hybrid_train.schema.problems import ConfigError, UserError
from hybrid_train.schema.pruning import Cut, CutMoe, CutSizes, Depth, MtpBlocks
from tests.pruned import FINAL_NORM, MTP_BLOCK
from tests.rankings import METRIC, equal_ranking, random_ranking, with_scores
from tests.tiny import tiny_job

ROWS = 64  # of the vocabulary
PARENT = tiny_job().model  # MEM*M-/*E/*E


def chosen(cut: Cut, ranking: Ranking | None = None, parent: Model = PARENT) -> Chosen:
    return choose(parent, ranking or random_ranking(parent), cut, ROWS)


def kept(found: Chosen, number: int, axis: Axis) -> list[Any]:
    """What a main layer of the child keeps, counted from 1."""
    result: list[Any] = found.selection.layers[number - 1].kept[axis].tolist()
    return result


def named(number: int, axis: Axis, parent: Model = PARENT) -> str:
    return name_of(layers(parent)[number - 1], axis)


# axis, its cut, and what is planted: name of the scores, the place, the layer, the element kept
PLANTED: dict[str, tuple[CutSizes, str, tuple[int, ...], int, Axis, int]] = {
    "hidden": (CutSizes(hidden_size=8), HIDDEN, (13,), 0, Axis.hidden, 13),
    "head channel": (
        CutSizes(mamba=MambaSizes(head_dim=8)),
        named(1, Axis.ssm_heads), (2, 11), 1, Axis.ssm_head_dim, 11,
    ),
    "Mamba head": (
        CutSizes(mamba=MambaSizes(heads=2)),
        named(3, Axis.ssm_heads), (3, 5), 3, Axis.ssm_heads, 3,
    ),
    "attention head": (
        CutSizes(attention=AttentionSizes(heads=2)), named(4, Axis.heads), (3,), 4, Axis.heads, 3,
    ),
    "group": (
        CutSizes(attention=AttentionSizes(kv_heads=1)),
        named(4, Axis.heads), (2,), 4, Axis.kv_groups, 1,
    ),
    "neuron": (
        CutSizes(mlp=MlpSizes(intermediate_size=8)), named(6, Axis.ffn), (50,), 6, Axis.ffn, 50,
    ),
    "expert": (
        CutSizes(moe=CutMoe(experts=2)), named(2, Axis.experts), (3,), 2, Axis.experts, 3,
    ),
    "shared neuron": (
        CutSizes(moe=CutMoe(shared_intermediate_size=8)),
        named(2, Axis.shared_ffn), (41,), 2, Axis.shared_ffn, 41,
    ),
    "latent channel": (
        CutSizes(moe=CutMoe(latent_size=8)), named(2, Axis.latent), (9,), 2, Axis.latent, 9,
    ),
    "neuron of an MTP expert": (
        CutSizes(moe=CutMoe(experts=2)), named(8, Axis.experts), (3,), 8, Axis.experts, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_element_survives(name: str) -> None:
    sizes, scores, place, layer, axis, element = PLANTED[name]
    ranking = random_ranking(PARENT)
    planted = ranking.scores[scores].copy()
    planted[place] = 1e6
    found = chosen(Cut(model=sizes), with_scores(ranking, {scores: planted}))
    left = found.selection.hidden if axis is Axis.hidden else kept(found, layer, axis)
    assert left is not None
    assert element in list(left)
    assert list(left) == sorted(left), "in the order of the parent"


def test_of_equal_scores_the_first_elements_stay() -> None:
    sizes = CutSizes(
        hidden_size=8,
        attention=AttentionSizes(heads=2),
        mamba=MambaSizes(heads=2, head_dim=8),
        mlp=MlpSizes(intermediate_size=16),
        moe=CutMoe(experts=2, intermediate_size=8),
    )
    found = chosen(Cut(model=sizes, depth=Depth(block=1)), equal_ranking(PARENT))
    assert found.model.pattern == "EM*M-/*E/*E"
    assert found.selection.hidden is not None
    assert found.selection.hidden.tolist() == list(range(8))
    assert kept(found, 1, Axis.experts) == [0, 1]
    assert kept(found, 1, Axis.expert_ffn) == [list(range(8))] * 2
    assert kept(found, 2, Axis.ssm_heads) == [0, 2]  # the first of each group
    assert kept(found, 2, Axis.ssm_head_dim) == list(range(8))
    assert kept(found, 3, Axis.heads) == [0, 2]
    assert kept(found, 5, Axis.ffn) == list(range(16))


def test_heads_of_the_scan_are_judged_by_the_channels_that_stay() -> None:
    table = np.zeros((4, 16))
    table[:, :8] = 1.0  # channels that stay, as the norm over heads says
    table[0, 15] = 1.9  # with it head 0 has more than head 1, and it goes: 1.9 is below 2.0
    table[0, :8] = 0.9
    table[1, :8] = 1.1
    sizes = CutSizes(mamba=MambaSizes(heads=2, head_dim=8))
    ranking = with_scores(random_ranking(PARENT), {named(1, Axis.ssm_heads): table})
    found = chosen(Cut(model=sizes), ranking)
    assert kept(found, 1, Axis.ssm_head_dim) == list(range(8))
    assert kept(found, 1, Axis.ssm_heads) == [1, 2]


def test_every_group_keeps_as_many_heads_though_one_has_the_best() -> None:
    best_first = {
        named(1, Axis.ssm_heads): np.outer([9, 8, 1, 2], np.ones(16)),
        named(4, Axis.heads): [9, 8, 1, 2],
    }
    sizes = CutSizes(attention=AttentionSizes(heads=2), mamba=MambaSizes(heads=2))
    found = chosen(Cut(model=sizes), with_scores(random_ranking(PARENT), best_first))
    assert kept(found, 1, Axis.ssm_heads) == [0, 3]
    assert kept(found, 4, Axis.heads) == [0, 3]


@pytest.mark.parametrize(
    ("sizes", "groups", "heads"),
    [
        (AttentionSizes(kv_heads=1), [0], [0, 1]),  # 5 + 5 above 9 + 0
        (AttentionSizes(kv_heads=1, heads=1), [1], [2]),  # where one head stays, 9 above 5
    ],
)
def test_groups_stay_by_the_sum_of_the_heads_that_they_would_keep(
    sizes: AttentionSizes, groups: list[int], heads: list[int]
) -> None:
    ranking = with_scores(random_ranking(PARENT), {named(4, Axis.heads): [5, 5, 9, 0]})
    found = chosen(Cut(model=CutSizes(attention=sizes)), ranking)
    assert kept(found, 4, Axis.kv_groups) == groups
    assert kept(found, 4, Axis.heads) == heads


def test_neurons_are_chosen_in_each_expert_that_stays() -> None:
    neurons = np.zeros((4, 32))
    for expert, first in enumerate((24, 16, 8, 0)):
        neurons[expert, first : first + 8] = 1.0
    changed = {named(2, Axis.experts): [0, 3, 1, 2], named(2, Axis.expert_ffn): neurons}
    sizes = CutSizes(moe=CutMoe(experts=2, intermediate_size=8))
    found = chosen(Cut(model=sizes), with_scores(random_ranking(PARENT), changed))
    assert kept(found, 2, Axis.experts) == [1, 3]
    assert kept(found, 2, Axis.expert_ffn) == [list(range(16, 24)), list(range(8))]


LAYERS = [5, 1, 6, 2, 4, 3]  # how much the layers of MEM*M- matter


@pytest.mark.parametrize(
    ("depth", "left"),
    [
        (Depth(drop=["2", "4-5"]), [1, 3, 6]),
        (Depth(keep=["first 2", "6"]), [1, 2, 6]),
        (Depth(layers=3), [1, 3, 5]),
        (Depth(mamba=1), [2, 3, 4, 6]),
        (Depth(mamba=2, attention=0), [1, 2, 3, 6]),
        (Depth(layers=4, moe=1), [1, 2, 3, 5]),
        (Depth(mamba=3), [1, 2, 3, 4, 5, 6]),
        (Depth(block=2), [1, 2, 5, 6]),
    ],
    ids=str,
)
def test_layers_stay_by_list_by_count_or_all_but_a_block(depth: Depth, left: list[int]) -> None:
    blocks = np.full((6, 6), NOT_MEASURED)
    for first, score in enumerate((5, 4, 1, 2, 3)):
        blocks[first, first + 1] = score
    changed = {f"layers.{METRIC}": LAYERS, f"blocks.{METRIC}": blocks}
    found = chosen(
        Cut(depth=depth, mtp=MtpBlocks.drop), with_scores(random_ranking(PARENT), changed)
    )
    assert [one.parent.number for one in found.selection.layers] == left
    assert found.model.pattern == "".join("MEM*M-"[number - 1] for number in left)
    assert [one.child.number for one in found.selection.layers] == list(range(1, len(left) + 1))


DENSE = replace(PARENT, pattern="*-*-*-*-")
OF_LETTERS = [1, 1, 5, 1, 2, 2, 0, 9]  # groups of two matter 2, 6, 4, 9


@pytest.mark.parametrize(
    ("depth", "left"),
    [
        (Depth(together=2, drop=["2-3"]), [1, 2, 7, 8]),
        (Depth(together=2, keep=["first 1", "4"]), [1, 2, 7, 8]),
        (Depth(together=2, layers=2), [3, 4, 7, 8]),
        (Depth(together=4, layers=1), [5, 6, 7, 8]),
        (Depth(together=2, block=2), [1, 2, 7, 8]),
        (Depth(block=4), [1, 2, 3, 8]),
    ],
    ids=str,
)
def test_layers_that_go_together_are_counted_and_stay_as_one(depth: Depth, left: list[int]) -> None:
    blocks = np.full((8, 8), NOT_MEASURED)
    for first, score in enumerate((3, 9, 1, 0, 2)):  # the least begins inside a group
        blocks[first, first + 3] = score
    changed = {f"layers.{METRIC}": OF_LETTERS, f"blocks.{METRIC}": blocks}
    ranking = with_scores(random_ranking(DENSE), changed)
    found = chosen(Cut(depth=depth), ranking, DENSE)
    assert [one.parent.number for one in found.selection.layers] == left


def test_a_block_of_groups_that_was_not_measured_is_named_as_it_is_asked_for() -> None:
    unmeasured = {f"blocks.{METRIC}": np.full((8, 8), NOT_MEASURED)}
    ranking = with_scores(random_ranking(DENSE), unmeasured)
    with pytest.raises(UserError, match=r"blocks of 4 layers; .*blocks=\[2\] together=2"):
        chosen(Cut(depth=Depth(together=2, block=2)), ranking, DENSE)


def elements(selection: Selection, child: Model) -> int:
    """Parameters of the tensors that are cut by a selection."""

    def left(one: Parameter, sizes: Any, kept: Any) -> int:
        places = tensor_positions(one, sizes, kept)
        shape = one.shape(sizes)
        return math.prod(
            size if place is None else len(place) for size, place in zip(shape, places, strict=True)
        )

    parent = selection.layers[0].parent.sizes._replace(vocab=ROWS)
    outer = [EMBEDDING, FINAL_NORM, HEAD, *(mtp_blocks(child) * MTP_BLOCK)]
    total = sum(left(one, parent, selection.shared) for one in outer)
    for layer in selection.layers:
        sizes, own = layer.parent.sizes, selection.of(layer)
        for one in layer.parent.parameters:
            experts = range(layer.child.sizes.experts) if one.of_experts else ()
            total += sum(left(one, sizes, of_expert(own, number)) for number in experts)
            total += left(one, sizes, own) if not one.of_experts else 0
    return total


def random_cut(random: np.random.Generator) -> Cut:
    def some(*values: int) -> Any:
        return random.choice([*values, None])

    sizes = CutSizes(
        hidden_size=some(8, 24),
        attention=AttentionSizes(kv_heads=some(1)),
        mamba=MambaSizes(heads=some(2), head_dim=some(8)),
        mlp=MlpSizes(intermediate_size=some(16, 40)),
        moe=CutMoe(
            experts=some(2, 3), intermediate_size=some(8, 24),
            shared_intermediate_size=some(16, 40), latent_size=some(8),
        ),
    )  # fmt: skip
    for number in random.permutation(6)[:2] + 1:
        rule = LayerRule(layers=str(number))
        letter = PARENT.pattern[number - 1]
        if letter == "M":
            rule.mamba = MambaSizes(heads=2)
        elif letter == "*":
            rule.attention = AttentionSizes(heads=2)
        elif letter == "-":
            rule.mlp = MlpSizes(intermediate_size=8)
        else:
            rule.moe = MoeSizes(experts=2, intermediate_size=16)
        sizes.layers.append(rule)
    gone = [number for number in (1, 5) if random.random() < 0.3]  # no rule loses all its layers
    depth = Depth(drop=[str(n) for n in gone if str(n) not in {r.layers for r in sizes.layers}])
    return Cut(model=sizes, depth=depth, mtp=MtpBlocks(random.choice(["keep", "drop"])))


@pytest.mark.parametrize("seed", range(20))
def test_the_tensors_that_are_left_are_those_of_the_child_to_the_unit(seed: int) -> None:
    cut = random_cut(np.random.default_rng(seed))
    found = chosen(cut, random_ranking(PARENT, seed))
    count = parameters(found.model, ROWS).total
    assert elements(found.selection, found.model) == count == found.parameters
    assert found.parent_parameters == parameters(PARENT, ROWS).total > count
    usual = sizes_of(found.model)
    assert all(one.child.sizes.hidden == usual.hidden for one in found.selection.layers)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({HIDDEN: np.full(32, np.nan)}, "hidden that are not finite"),
        ({HIDDEN: np.ones(31)}, r"shape \[31\], and the model has \[32\]"),
        ({named(1, Axis.ssm_heads): np.ones((16, 4))}, r"the model has \[4, 16\]"),
    ],
)
def test_scores_that_are_not_of_this_model_are_refused(
    changed: dict[str, object], said: str
) -> None:
    ranking = with_scores(random_ranking(PARENT), changed)
    with pytest.raises(UserError, match=said):
        chosen(Cut(model=CutSizes(hidden_size=8, mamba=MambaSizes(heads=2))), ranking)


def test_a_cut_that_needs_no_scores_needs_no_ranking() -> None:
    listed = Cut(depth=Depth(drop=["2"]), mtp=MtpBlocks.drop)
    assert choose(PARENT, None, listed, ROWS).model.pattern == "MM*M-"
    with pytest.raises(ConfigError, match="ranking = null: must name the ranking"):
        choose(PARENT, None, Cut(model=CutSizes(hidden_size=8)), ROWS)


def test_a_metric_or_block_that_was_not_measured_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"depth.metric = loss: .* nearest: cosine"):
        chosen(Cut(depth=Depth(layers=3, metric="loss")))
    two = with_scores(random_ranking(PARENT), {"layers.loss": LAYERS})
    with pytest.raises(ConfigError, match=r"depth.metric = null: .* cosine, loss"):
        chosen(Cut(depth=Depth(layers=3)), two)
    assert chosen(Cut(depth=Depth(layers=3, metric="loss")), two).model.pattern == "MMM/*E/*E"
    unmeasured = np.full((6, 6), NOT_MEASURED)
    ranking = with_scores(random_ranking(PARENT), {f"blocks.{METRIC}": unmeasured})
    with pytest.raises(UserError, match=r"no scores of blocks of 3 layers; .*blocks=\[3\]"):
        chosen(Cut(depth=Depth(block=3)), ranking)


@pytest.mark.parametrize(
    "cut",
    [Cut(model=CutSizes(hidden_size=32)), Cut(budget="1B"), Cut(share=1.0)],
    ids=["size", "budget", "share"],
)
def test_a_cut_that_leaves_the_parent_as_it_is_is_refused(cut: Cut) -> None:
    with pytest.raises(ConfigError, match="cuts nothing: the parent has"):
        chosen(cut)


def test_a_child_is_cut_again_and_what_is_smaller_already_stays() -> None:
    rules = [LayerRule(layers="3", mamba=MambaSizes(head_dim=8, heads=2))]
    once = chosen(Cut(model=CutSizes(layers=rules), depth=Depth(drop=["2"]))).model
    assert [(one.letter, one.sizes.ssm_heads) for one in layers(once)[:2]] == [("M", 4), ("M", 2)]
    again = Cut(model=CutSizes(mamba=MambaSizes(head_dim=12)), multiple=4)
    found = chosen(again, random_ranking(once), once)
    widths = [
        one.child.sizes.ssm_head_dim for one in found.selection.layers if one.child.letter == "M"
    ]
    assert widths == [12, 8, 12]
    assert Axis.ssm_head_dim not in found.selection.layers[1].kept
