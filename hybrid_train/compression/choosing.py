"""A child is chosen: which layers and elements of its parent stay, by scores and a cut.

What stays of an axis is what scored highest, in the order of the parent; of equal scores the first
stays. With a share or a budget the sizes are searched first (`compression/size_search.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_train.anatomy.axes import Axis, Sizes
from hybrid_train.anatomy.counts import parameters
from hybrid_train.anatomy.kinds import CHOSEN
from hybrid_train.anatomy.layers import Layer, layers
from hybrid_train.anatomy.selection import Indices, KeptLayer, Selection
from hybrid_train.compression.child_sizes import (
    Plan,
    child_layers,
    child_model,
    listed_layers,
    plan_of,
)
from hybrid_train.compression.cut_rules import depth_problems, multiple_of, size_problems
from hybrid_train.compression.ranking import NOT_MEASURED, Ranking, order
from hybrid_train.compression.size_search import Target, searched
from hybrid_train.schema import model as sections
from hybrid_train.schema.layer_ranges import layers_of_groups
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.pruning import Cut, Depth
from hybrid_train.schema.units import tokens

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    """A child.

    Attributes:
        model: its section, with the pattern and sizes of its layers.
        selection: what of the parent it is made of.
        parameters: how many it has.
        parent_parameters: how many its parent has.
    """

    model: Model
    selection: Selection
    parameters: int
    parent_parameters: int


def choose(parent: Model, ranking: Ranking | None, cut: Cut, vocab_rows: int) -> Chosen:
    """Choose what a child is made of.

    Args:
        parent: the model that is cut.
        ranking: how much its elements matter; None where no score is needed.
        cut: what is asked.
        vocab_rows: of embedding and head, as they are stored; they count.

    Raises:
        ConfigError: with every size that no child of this parent can have, and the nearest legal.
        UserError: if scores that are needed are not there, not finite, or of another model.
    """
    scores = _Scores(ranking)
    plan = _plan(parent, scores, cut, vocab_rows)
    model = child_model(parent, plan)
    total, count = (parameters(one, vocab_rows).total for one in (parent, model))
    if count == total:
        raise ConfigError([_nothing(cut, total)])
    return Chosen(
        model, _selection(parent, child_layers(parent, plan), model, scores), count, total
    )


def child_of(parent: Model, cut: Cut, vocab_rows: int) -> Model | None:
    """Return the model of a child before there are scores; None where they say which layers stay.

    Args:
        parent: the model that is cut.
        cut: what is asked.
        vocab_rows: of embedding and head, as they are stored; they count.

    Raises:
        ConfigError: as `choose` does.
    """
    try:
        return child_model(parent, _plan(parent, _Scores(None), cut, vocab_rows))
    except _UnrankedError:
        return None


def _plan(parent: Model, scores: "_Scores", cut: Cut, vocab_rows: int) -> Plan:
    """Return which layers stay, and the sizes; scores are asked for those of layers alone."""
    problems = list(depth_problems(parent, cut))
    number = len(parse(parent.pattern).main)
    whole = range(1, number + 1)
    main = list(whole) if problems else kept_main(parent, scores, cut.depth)
    plan = plan_of(parent, cut, main)
    problems += size_problems(parent, plan, multiple_of(cut))
    if problems:
        raise ConfigError(problems)
    if cut.share is not None or cut.budget is not None:
        total = parameters(parent, vocab_rows).total
        most = int(cut.share * total) if cut.share is not None else tokens(str(cut.budget))
        plan = searched(parent, plan, cut, Target(most, total, vocab_rows), scores.of_layers)
        if problems := list(size_problems(parent, plan, 1)):  # of layers that went
            raise ConfigError(problems)
    return plan


def _nothing(cut: Cut, total: int) -> Problem:
    """Return the problem of a child that would be its parent."""
    rule = f"cuts nothing: the parent has {total:,} parameters"
    if cut.share is not None or cut.budget is not None:
        name, asked = ("share", cut.share) if cut.budget is None else ("budget", cut.budget)
        return Problem(name, asked, rule)
    name, size = next(iter(cut.model.given.items()), ("layers", "rules"))
    return Problem(f"model.{name}", size, rule)


class _UnrankedError(ConfigError):
    """Scores are needed, and there is no ranking."""


class _Scores:
    """Scores as they are needed: there, of this model, and finite."""

    def __init__(self, ranking: Ranking | None) -> None:
        self._ranking = ranking

    @property
    def ranking(self) -> Ranking:
        if self._ranking is None:
            rule = "must name the ranking of the checkpoint: what matters least of it is cut"
            raise _UnrankedError([Problem("ranking", "null", rule)])
        return self._ranking

    def of(self, layer: Layer, axis: Axis, shape: tuple[int, ...]) -> Values:
        """Return those of an axis of a layer, float64."""
        return self._sound(self.ranking.of(layer, axis), shape, f"{layer.prefix}{axis.name}")

    def of_hidden(self, number: int) -> Values:
        """Return those of the hidden channels, float64."""
        return self._sound(self.ranking.hidden, (number,), "hidden")

    def of_layers(self, depth: Depth, number: int) -> Values:
        """Return those of the main layers, or the sums of those that go together, [groups]."""
        name = self._metric("layers.", depth.metric)
        found = self._sound(self.ranking.layers(name), (number,), f"layers.{name}")
        return found.reshape(-1, depth.together).sum(axis=1)

    def of_blocks(self, depth: Depth, number: int) -> Values:
        """Return those of so many neighbours, by the first of them, or their first group."""
        assert depth.block is not None
        name = self._metric("blocks.", depth.metric)
        table = self._sound(self.ranking.blocks(name), (number, number), f"blocks.{name}")
        length = depth.block * depth.together
        found = np.diagonal(table, offset=length - 1)[:: depth.together]
        if found.min() >= NOT_MEASURED:
            together = f" together={depth.together}" if depth.together > 1 else ""
            raise UserError(
                f"the ranking of {self.ranking.header.run} has no scores of blocks of {length} "
                f"layers; make one with blocks=[{depth.block}]{together}"
            )
        return found

    def _metric(self, kind: str, metric: str | None) -> str:
        there = [name.removeprefix(kind) for name in self.ranking.scores if name.startswith(kind)]
        if metric is None and len(there) == 1:
            return there[0]
        if metric is None or metric not in there:
            named = ", ".join(there) or "none: importance makes them if it is asked to"
            rule = f"must be one of those that the ranking has of {kind.rstrip('.')}: {named}"
            nearest = there[0] if there else None
            raise ConfigError([Problem("depth.metric", metric or "null", rule, nearest)])
        return metric

    def _sound(self, found: npt.NDArray[np.float32], shape: tuple[int, ...], name: str) -> Values:
        run = self.ranking.header.run
        if found.shape != shape:
            raise UserError(
                f"the ranking of {run} has scores of {name} of shape {list(found.shape)}, and the "
                f"model has {list(shape)}: it is of another model; make one of this checkpoint"
            )
        if not np.isfinite(found).all():
            raise UserError(f"the ranking of {run} has scores of {name} that are not finite")
        return found.astype(np.float64)


def top(scores: Values, number: int) -> Indices:
    """Return the elements that matter most, so many of them, in the order that they have."""
    return np.sort(order(scores)[:number])


def kept_main(parent: Model, scores: _Scores, depth: Depth) -> list[int]:
    """Return the main layers that stay, from 1.

    Args:
        parent: the model that is cut.
        scores: of its layers, or blocks of them.
        depth: what is asked.
    """
    letters, together = parse(parent.pattern).main, depth.together
    number, groups = len(letters), range(1, len(letters) // together + 1)
    if depth.drop or depth.keep:
        return listed_layers(depth, number)
    if depth.block is not None:
        first = int(order(-scores.of_blocks(depth, number))[0]) + 1
        gone = range(first, first + depth.block)
        return layers_of_groups([one for one in groups if one not in gone], together)
    goes = any(letters.count(letter) > left for letter, left in depth.of_kinds.items())
    if depth.layers is None and not goes:
        return list(range(1, number + 1))
    of_layers = scores.of_layers(depth, number)
    kinds = np.array(list(letters[::together]))
    others = ~np.isin(kinds, list(depth.of_kinds))
    of_others = int(others.sum())
    if depth.layers is not None:
        of_others = depth.layers - sum(depth.of_kinds.values())
    kept = [np.flatnonzero(others)[top(of_layers[others], of_others)]]
    for letter, count in depth.of_kinds.items():
        here = np.flatnonzero(kinds == letter)
        kept.append(here[top(of_layers[here], count)])
    return layers_of_groups((int(one) + 1 for one in np.sort(np.concatenate(kept))), together)


def _selection(
    parent: Model, found: Sequence[tuple[Layer, Sizes]], model: Model, scores: _Scores
) -> Selection:
    kept = []
    for (layer, sizes), child in zip(found, layers(model), strict=True):
        assert all(child.sizes.along(axis) == sizes.along(axis) for axis in CHOSEN[layer.letter])
        kept.append(KeptLayer(layer, child, kept_of(layer, sizes, scores)))
    hidden = None
    if model.hidden_size < parent.hidden_size:
        hidden = top(scores.of_hidden(parent.hidden_size), model.hidden_size)
    return Selection(tuple(kept), hidden)


def kept_of(layer: Layer, sizes: Sizes, scores: _Scores) -> dict[Axis, Indices]:
    """Return what stays of the axes of a layer that get smaller.

    Args:
        layer: of the parent.
        sizes: that it gets.
        scores: of its axes.
    """
    smaller = {axis for axis in CHOSEN[layer.letter] if sizes.along(axis) < layer.sizes.along(axis)}
    return _KEEPERS[layer.letter](layer, sizes, scores, smaller) if smaller else {}


def _of_mamba(
    layer: Layer, sizes: Sizes, scores: _Scores, smaller: set[Axis]
) -> dict[Axis, Indices]:
    """Channels by their norm over all heads; heads by that of the channels left, in each group.

    Source: Minitron-SSM, arXiv:2504.11409, nested group-aware ranking.
    """
    own = layer.sizes
    table = scores.of(layer, Axis.ssm_heads, (own.ssm_heads, own.ssm_head_dim))
    channels = top(np.linalg.norm(table, axis=0), sizes.ssm_head_dim)
    of_heads = np.linalg.norm(table[:, channels], axis=1)
    heads, _ = _in_groups(of_heads, own.ssm_groups, sizes.ssm_heads // sizes.ssm_groups)
    kept = {Axis.ssm_head_dim: channels, Axis.ssm_heads: heads.ravel()}
    return {axis: one for axis, one in kept.items() if axis in smaller}


def _of_attention(
    layer: Layer, sizes: Sizes, scores: _Scores, smaller: set[Axis]
) -> dict[Axis, Indices]:
    """Heads within each group; groups by the sum of those of their heads that would stay."""
    own = layer.sizes
    of_heads = scores.of(layer, Axis.heads, (own.heads,))
    heads, sums = _in_groups(of_heads, own.kv_groups, sizes.heads // sizes.kv_groups)
    groups = top(sums, sizes.kv_groups)
    kept = {Axis.kv_groups: groups, Axis.heads: heads[groups].ravel()}
    return {axis: one for axis, one in kept.items() if axis in smaller}


def _in_groups(scores: Values, groups: int, share: int) -> tuple[Indices, Values]:
    """Return so many members of each group, [groups, share], and the sum of their scores."""
    by_group = scores.reshape(groups, -1)
    places = np.stack([top(one, share) for one in by_group])
    sums = np.take_along_axis(by_group, places, axis=1).sum(axis=1)
    return places + np.arange(groups)[:, None] * by_group.shape[1], sums


def _of_mlp(layer: Layer, sizes: Sizes, scores: _Scores, _: set[Axis]) -> dict[Axis, Indices]:
    return {Axis.ffn: top(scores.of(layer, Axis.ffn, (layer.sizes.ffn,)), sizes.ffn)}


def _of_experts(
    layer: Layer, sizes: Sizes, scores: _Scores, smaller: set[Axis]
) -> dict[Axis, Indices]:
    """Experts first, then neurons in each that stays."""
    own = layer.sizes
    kept: dict[Axis, Indices] = {
        axis: top(scores.of(layer, axis, (own.along(axis),)), sizes.along(axis))
        for axis in (Axis.experts, Axis.shared_ffn, Axis.latent)
        if axis in smaller
    }
    if Axis.expert_ffn in smaller:
        table = scores.of(layer, Axis.expert_ffn, (own.experts, own.expert_ffn))
        left = kept.get(Axis.experts, np.arange(own.experts))
        kept[Axis.expert_ffn] = np.stack([top(table[one], sizes.expert_ffn) for one in left])
    return kept


_Keeper = Callable[[Layer, Sizes, _Scores, set[Axis]], dict[Axis, Indices]]
_KEEPERS: Mapping[str, _Keeper] = {
    sections.Mamba.letter: _of_mamba,
    sections.Attention.letter: _of_attention,
    sections.Mlp.letter: _of_mlp,
    sections.Moe.letter: _of_experts,
}
