"""Sizes are searched for a number of parameters: all widths by one share, then the nearest.

1. Layers: all, or if the widths at their narrowest are too many, those that matter most of them.
2. The largest share of every width, in its own multiples, that is not above the number.
3. Each width one step up or down: the combination nearest to the number, and not above it.
4. Single steps up for as long as one fits, so that no width could be larger by a step.

No chance is in it: the same cut gives the same sizes. Layers before widths would cost more of what
the parent knows (Minitron, arXiv:2407.14679; Minitron-SSM, arXiv:2504.11409, at half the size).
"""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from hybrid_train.anatomy.axes import Axis, Sizes
from hybrid_train.anatomy.counts import parameters
from hybrid_train.anatomy.kinds import CHOSEN
from hybrid_train.anatomy.layers import Layer
from hybrid_train.compression.child_sizes import Plan, child_layers, child_model
from hybrid_train.compression.cut_rules import CHANNELS, LEAST_MULTIPLE
from hybrid_train.compression.ranking import order
from hybrid_train.schema.layer_ranges import layers_of_groups
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import ConfigError, Problem
from hybrid_train.schema.pruning import DEPTH, Cut, Depth
from hybrid_train.schema.units import counted

OfLayers = Callable[[Depth, int], npt.NDArray[np.float64]]  # layers -> scores of groups
_Steps = tuple[int, ...]  # place of each width among the sizes that it may have


@dataclass(frozen=True)
class Target:
    """How large a child may be.

    Attributes:
        most: parameters.
        parent: parameters of the parent.
        vocab_rows: of embedding and head, as they are stored.
    """

    most: int
    parent: int
    vocab_rows: int


@dataclass(frozen=True)
class _Space:
    """What may be tried.

    Attributes:
        axes: that are free.
        sizes: legal ones of each, ascending; the last is the parent's.
        count: parameters of a child.
    """

    axes: tuple[Axis, ...]
    sizes: tuple[tuple[int, ...], ...]
    count: Callable[[_Steps], int]

    @property
    def narrowest(self) -> _Steps:
        return (0,) * len(self.axes)

    def at(self, share: float) -> _Steps:
        """Return the largest sizes that are at most this share of the parent's."""
        return tuple(
            max((n for n, size in enumerate(sizes) if size <= share * sizes[-1] + 1e-6), default=0)
            for sizes in self.sizes
        )

    def named(self, steps: _Steps) -> dict[Axis, int]:
        return {
            axis: sizes[step]
            for axis, sizes, step in zip(self.axes, self.sizes, steps, strict=True)
        }

    def is_legal(self, steps: _Steps) -> bool:
        return all(0 <= step < len(sizes) for step, sizes in zip(steps, self.sizes, strict=True))


def searched(parent: Model, plan: Plan, cut: Cut, target: Target, of_layers: OfLayers) -> Plan:
    """Return the plan with sizes whose parameters are nearest to a number and not above it.

    Args:
        parent: the model that is cut.
        plan: sizes and layers that are fixed.
        cut: which sizes may be searched, and within what.
        target: what is looked for.
        of_layers: scores of the main layers, those that go together as one.

    Raises:
        ConfigError: if no sizes are small enough; with the smallest number that some are.
    """
    space = _space(parent, plan, cut, target.vocab_rows)
    removable = _removable(parent, plan, cut)
    if space.count(space.narrowest) > target.most:
        plan, space = _shortened(parent, plan, cut, target, of_layers if removable else None)
    steps = _nearest(space, target.most)
    return replace(plan, sizes={**plan.sizes, **space.named(steps)})


def _space(parent: Model, plan: Plan, cut: Cut, vocab_rows: int) -> _Space:
    free = [Axis(name) for name in cut.shrink if name != DEPTH and name not in cut.model.given]
    legal = {axis: _legal_sizes(parent, plan, cut, axis) for axis in free}
    axes = tuple(axis for axis, sizes in legal.items() if len(sizes) > 1)
    sizes = tuple(legal[axis] for axis in axes)

    @cache
    def count(steps: _Steps) -> int:
        named = {axis: of[step] for axis, of, step in zip(axes, sizes, steps, strict=True)}
        child = child_model(parent, replace(plan, sizes={**plan.sizes, **named}))
        return parameters(child, vocab_rows).total

    return _Space(axes, sizes, count)


def _legal_sizes(parent: Model, plan: Plan, cut: Cut, axis: Axis) -> tuple[int, ...]:
    """Return what may be tried of an axis, ascending; nothing for what the parent lacks."""
    if axis is Axis.hidden:
        largest, step, least = parent.hidden_size, 0, 1
    else:
        here = [(one, sizes) for one, sizes in child_layers(parent, plan)
                if axis in CHOSEN[one.letter]]  # fmt: skip
        largest = max((sizes.along(axis) for _, sizes in here), default=0)
        step = math.lcm(*(_groups(one, sizes, axis) for one, sizes in here))
        least = 1
        if axis is Axis.experts:
            least = max((sizes.top_k for _, sizes in here), default=1)
            step = _shared_out(largest)
    if axis in CHANNELS:
        step = cut.multiple or _power_near(largest)
    low = max(math.ceil(cut.narrowest * largest - 1e-9), least)
    first = max(math.ceil(low / step), 1) * step
    return (*range(first, largest, step), largest) if largest else ()


def _power_near(size: int) -> int:
    """Return the largest power of two up to a 32nd of a size: sizes that GEMMs are fast with."""
    return max(LEAST_MULTIPLE, 2 ** int(math.log2(max(size // 32, 1))))


def _shared_out(experts: int) -> int:
    """Return the largest power of two up to a 16th: so many ranks can share what stays."""
    return 2 ** int(math.log2(max(experts // 16, 1)))


def _groups(layer: Layer, sizes: Sizes, axis: Axis) -> int:
    """Return how many groups a layer has whose members are along an axis; 1 where it has none."""
    pair = layer.kind.groups
    return sizes.along(pair[0]) if pair and pair[1] is axis else 1


def _removable(parent: Model, plan: Plan, cut: Cut) -> bool:
    """Tell whether the search may take layers: it does not where a cut says which."""
    return DEPTH in cut.shrink and not cut.depth.ways and len(plan.main) > cut.depth.together


def _shortened(
    parent: Model,
    plan: Plan,
    cut: Cut,
    target: Target,
    of_layers: OfLayers | None,
) -> tuple[Plan, _Space]:
    """Take out the layers that matter least, as few as the narrowest widths need.

    Raises:
        ConfigError: if the narrowest widths of one layer are too many still.
    """
    number, together = len(parse(parent.pattern).main), cut.depth.together
    groups = number // together
    ranked = order(of_layers(cut.depth, number)) if of_layers else np.arange(groups)
    fewest = 1 if of_layers else groups
    for left in range(groups, fewest - 1, -1):
        main = layers_of_groups((int(one) + 1 for one in np.sort(ranked[:left])), together)
        shorter = replace(plan, main=tuple(main)) if of_layers else plan
        space = _space(parent, shorter, cut, target.vocab_rows)
        if space.count(space.narrowest) <= target.most:
            return shorter, space
    raise ConfigError([_unmet(cut, target, space, shorter)])


def _unmet(cut: Cut, target: Target, space: _Space, plan: Plan) -> Problem:
    least = space.count(space.narrowest)
    widths = ", ".join(axis.value for axis in space.axes)
    rule = f"asks for at most {target.most:,} parameters, and {least:,} are the fewest: "
    rule += f"{widths} at {cut.narrowest:.0%} (narrowest)" if widths else "no width may be searched"
    if DEPTH not in cut.shrink or cut.depth.ways:
        rule += f", {counted(len(plan.main), 'layer')} that nothing lets go"
    else:
        rule += f", {counted(cut.depth.together, 'layer')}"
    if cut.budget is not None:
        return Problem("budget", cut.budget, rule, least)
    return Problem("share", cut.share, rule, math.ceil(least / target.parent * 1e4) / 1e4)


def _nearest(space: _Space, most: int) -> _Steps:
    """Return the sizes whose parameters are nearest to a number that the narrowest are not above.

    Args:
        space: what may be tried.
        most: the number.
    """
    shares = sorted({size / sizes[-1] for sizes in space.sizes for size in sizes})
    fitting = bisect.bisect_right(shares, most, key=lambda share: space.count(space.at(share)))
    even = space.at(shares[fitting - 1]) if shares else ()
    moves = itertools.product((0, 1, -1), repeat=len(space.axes))
    band = [_moved(even, move) for move in sorted(moves, key=lambda one: sum(map(abs, one)))]
    best = max(_fitting(space, band, most), key=space.count)
    while True:
        ups = (tuple(int(n == place) for n in range(len(best))) for place in range(len(best)))
        larger = _fitting(space, [_moved(best, up) for up in ups], most)
        if not larger:
            return best
        best = max(larger, key=space.count)


def _moved(steps: _Steps, move: _Steps) -> _Steps:
    return tuple(step + by for step, by in zip(steps, move, strict=True))


def _fitting(space: _Space, tried: Sequence[_Steps], most: int) -> list[_Steps]:
    return [one for one in tried if space.is_legal(one) and space.count(one) <= most]
