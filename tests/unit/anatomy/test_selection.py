"""Which elements of a tensor a selection keeps, held against labels that are cut by hand."""

import itertools

import numpy as np
import pytest

from hybrid_train.anatomy.axes import Axis, Sizes
from hybrid_train.anatomy.kinds import AttentionKind, MambaKind, Parameter, parameters_of
from hybrid_train.anatomy.layers import Layer
from hybrid_train.anatomy.selection import (
    Kept,
    KeptLayer,
    held_positions,
    of_expert,
    positions,
    tensor_positions,
)
from tests.pruned import MTP_BLOCK

PARENT = Sizes(
    vocab=32, hidden=6, heads=6, kv_groups=3, head_dim=4, ssm_heads=8, ssm_head_dim=3,
    ssm_groups=2, ssm_state=5, ffn=7, experts=4, expert_ffn=5, shared_ffn=6, latent=4,
)  # fmt: skip


def test_queries_keys_and_values_stay_with_their_group() -> None:
    kept: Kept = {
        Axis.kv_groups: np.array([2, 0]),  # in another order
        Axis.heads: np.array([5, 1]),  # the second head of each
    }
    rows = []
    for group in range(3):  # as Megatron packs them: queries of a group, its key, its value
        rows += [("q", head, d) for head in (2 * group, 2 * group + 1) for d in range(4)]
        rows += [("k", group, d) for d in range(4)] + [("v", group, d) for d in range(4)]
    wanted = []
    for group, head in ((2, 5), (0, 1)):
        wanted += [("q", head, d) for d in range(4)]
        wanted += [("k", group, d) for d in range(4)] + [("v", group, d) for d in range(4)]
    found = positions(AttentionKind.packed, PARENT, kept)
    assert found is not None
    assert [rows[place] for place in found] == wanted
    inner = positions(AttentionKind.inner, PARENT, kept)
    assert inner is not None
    assert inner.tolist() == [5 * 4 + d for d in range(4)] + [4 + d for d in range(4)]


def test_heads_and_channels_of_the_scan_are_cut_and_its_groups_stay() -> None:
    kept: Kept = {Axis.ssm_heads: np.array([3, 1, 4, 6]), Axis.ssm_head_dim: np.array([2, 0])}
    inner = list(itertools.product(range(8), range(3)))
    rows = [*(("z", *at) for at in inner), *(("x", *at) for at in inner)]
    state = list(itertools.product(range(2), range(5)))
    rows += [*(("B", *at) for at in state), *(("C", *at) for at in state)]
    rows += [("dt", head) for head in range(8)]
    left = list(itertools.product((3, 1, 4, 6), (2, 0)))
    wanted = [*(("z", *at) for at in left), *(("x", *at) for at in left)]
    wanted += [*(("B", *at) for at in state), *(("C", *at) for at in state)]
    wanted += [("dt", head) for head in (3, 1, 4, 6)]
    found = positions(MambaKind.packed, PARENT, kept)
    assert found is not None
    assert [rows[place] for place in found] == wanted


def test_each_expert_keeps_neurons_of_its_own() -> None:
    kept: Kept = {
        Axis.experts: np.array([3, 1]),
        Axis.expert_ffn: np.array([[4, 0], [2, 3]]),
        Axis.hidden: np.array([5, 0]),
        Axis.latent: np.array([1, 2]),
    }
    up = named("mlp.experts.linear_fc1.weight")
    for expert, neurons in enumerate(([4, 0], [2, 3])):
        rows, columns = tensor_positions(up, PARENT, of_expert(kept, expert))
        assert rows is not None
        assert columns is not None
        assert rows.tolist() == neurons
        assert columns.tolist() == [1, 2]  # experts work on latent channels


def test_a_projection_of_two_inputs_keeps_the_same_channels_of_both() -> None:
    joined = next(one for one in MTP_BLOCK if one.linear)
    rows, columns = tensor_positions(joined, PARENT, {Axis.hidden: np.array([5, 0])})
    assert rows is not None
    assert columns is not None
    assert rows.tolist() == [5, 0]
    assert columns.tolist() == [5, 0, 11, 6]


def test_what_nothing_is_said_of_stays_as_it_is() -> None:
    found = tensor_positions(named("mlp.router.weight"), PARENT, {Axis.ffn: np.array([1])})
    assert found == (None, None)


@pytest.mark.parametrize(
    ("heads", "said"),
    [([0, 1], "cross"), ([4, 0], "cross"), ([0, 0], "twice"), ([0, 9], "beyond")],
)
def test_heads_that_leave_their_groups_are_no_layer(heads: list[int], said: str) -> None:
    child = PARENT._replace(ssm_heads=2)
    with pytest.raises(AssertionError, match=said):
        KeptLayer(
            Layer("M", 1, 0, PARENT),
            Layer("M", 1, 0, child),
            {Axis.ssm_heads: np.array(heads)},
        )


def test_channels_that_differ_between_heads_are_no_layer() -> None:
    child = PARENT._replace(ssm_head_dim=2)
    by_head = np.tile([[0, 1], [1, 2]], (4, 1))
    with pytest.raises(AssertionError, match="the same are kept in every head"):
        KeptLayer(Layer("M", 1, 0, PARENT), Layer("M", 1, 0, child), {Axis.ssm_head_dim: by_head})


def named(name: str) -> Parameter:
    return next(one for one in parameters_of("E", PARENT) if one.name == name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_hold_a_run_of_every_part_or_some_of_the_groups(ranks: int) -> None:
    sizes = PARENT._replace(kv_groups=2)
    inner, state, heads = 8 * 3, 2 * 5, 8
    parts = [inner, inner, state, state, heads]  # z, x, B, C, dt
    starts = np.cumsum([0, *parts])
    by_rank = [held_positions(MambaKind.packed, sizes, rank, ranks) for rank in range(ranks)]
    for rank, found in enumerate(by_rank):
        wanted = [
            np.arange(start + rank * size // ranks, start + (rank + 1) * size // ranks)
            for start, size in zip(starts, parts, strict=False)
        ]
        assert found.tolist() == np.concatenate(wanted).tolist()
    alternating = [
        held_positions(AttentionKind.packed, sizes, rank, ranks) for rank in range(ranks)
    ]
    assert np.concatenate(alternating).tolist() == list(range(AttentionKind.packed.size(sizes)))
