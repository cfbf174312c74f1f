"""Which elements of each axis of a model are kept, and where they lie in its tensors.

A selection says what a smaller model is made of. What cuts files, masks a model or takes a prefix
of it reads the same selection, so that all of them mean the same child.

What moves together: heads of a group of the scan or of the keys stay with their group, and every
group that is left has as many; a channel of a Mamba head is the same in all heads of a layer; the
inner neurons of an expert are its own; the axes of a model as a whole have one choice (`hidden`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybrid_train.anatomy.axes import Axis, Dim, Part, Sizes
from hybrid_train.anatomy.kinds import CHOSEN, Parameter
from hybrid_train.anatomy.layers import Layer

Indices = npt.NDArray[np.int64]
# Elements that are kept along an axis, as they are numbered in the parent, in the order that they
# have in the child: [n]; of `expert_ffn` [experts of the child, n]. An axis that is not there is
# kept whole.
Kept = Mapping[Axis, Indices]


@dataclass(frozen=True)
class KeptLayer:
    """One layer of a child.

    Attributes:
        parent: the layer of the parent that it is made of.
        child: itself, with its own number and sizes.
        kept: of its own axes; not of `hidden`.
    """

    parent: Layer
    child: Layer
    kept: Kept = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.parent.letter == self.child.letter, "a layer stays of its kind"
        for axis in CHOSEN[self.parent.letter]:
            chosen = self.kept.get(axis)
            number, of = self.child.sizes.along(axis), self.parent.sizes.along(axis)
            if chosen is None:
                assert number == of, f"{axis.value}: {number} of {of}, and nothing says which"
            else:
                own = chosen.ndim == 1 or axis is Axis.expert_ffn
                assert own, f"{axis.value}: the same are kept in every head"
                _require_choice(chosen, number, of, axis)
        self._require_groups()

    def _require_groups(self) -> None:
        """See that every group that is left has as many members, all of them its own."""
        pair = self.parent.kind.groups
        if pair is None:
            return
        groups, members = pair
        of, number = self.parent.sizes, self.child.sizes
        kept_groups = chosen(self.kept, groups, of)
        kept_members = chosen(self.kept, members, of)
        owners = kept_members // (of.along(members) // of.along(groups))
        share = number.along(members) // number.along(groups)
        assert np.array_equal(owners, np.repeat(kept_groups, share)), (
            f"{members.value} of {self.parent.prefix} cross the borders of their groups"
        )


def _require_choice(chosen: Indices, number: int, of: int, axis: Axis) -> None:
    rows = chosen if chosen.ndim > 1 else chosen[None]
    assert rows.shape[1] == number, f"{axis.value}: {rows.shape[1]} are chosen, not {number}"
    assert rows.size == 0 or (rows.min() >= 0 and rows.max() < of), f"{axis.value}: beyond {of}"
    assert all(len(np.unique(row)) == number for row in rows), f"{axis.value}: one is there twice"


@dataclass(frozen=True)
class Selection:
    """What a child is made of.

    Attributes:
        layers: of the child: the main layers, then those of each MTP block with its own weights.
        hidden: channels that are kept in all of them; None: all, as they are.
    """

    layers: tuple[KeptLayer, ...]
    hidden: Indices | None = None

    @property
    def shared(self) -> Kept:
        """What holds for the whole model."""
        return {} if self.hidden is None else {Axis.hidden: self.hidden}

    def of(self, layer: KeptLayer) -> Kept:
        """Return all that is kept of the axes that a layer meets."""
        return {**self.shared, **layer.kept}


def chosen(kept: Kept, axis: Axis, sizes: Sizes) -> Indices:
    """Return what is kept along an axis; all, where nothing is said of it."""
    found = kept.get(axis)
    return np.arange(sizes.along(axis)) if found is None else found


def of_expert(kept: Kept, expert: int) -> Kept:
    """Return what is kept of one expert, counted as in the child."""
    inner = kept.get(Axis.expert_ffn)
    return kept if inner is None else {**kept, Axis.expert_ffn: inner[expert]}


def part_positions(part: Part, sizes: Sizes, kept: Kept) -> Indices | None:
    """Return which rows of a part are kept, in their order; None for all, as they are.

    Args:
        part: a product of axes.
        sizes: of the parent.
        kept: along its axes; of one expert, where it is one of experts (`of_expert`).
    """
    if not any(axis in kept for axis in part.axes):
        return None
    rows = np.arange(part.times)
    for axis in part.axes:
        picked = chosen(kept, axis, sizes)
        rows = (rows[:, None] * sizes.along(axis) + picked[None]).ravel()
    return rows


def positions(dim: Dim, sizes: Sizes, kept: Kept) -> Indices | None:
    """Return which elements of a dimension are kept, in their order; None for all, as they are.

    Args:
        dim: of a tensor.
        sizes: of the parent.
        kept: along its axes; of one expert, where it is one of experts (`of_expert`).
    """
    if not any(axis in kept for part in dim.parts for axis in part.axes):
        return None
    runs = sizes.along(dim.by) if dim.by else 1
    left = len(chosen(kept, dim.by, sizes)) if dim.by else 1
    places, start = [], 0
    for part in dim.parts:
        size = part.size(sizes)
        rows = part_positions(part, sizes, kept)
        rows = np.arange(size) if rows is None else rows
        run, row = np.divmod(rows, size // runs)
        places.append((run * (dim.size(sizes) // runs) + start + row).reshape(left, -1))
        start += size // runs
    return np.concatenate(places, axis=1).ravel()


def held_positions(dim: Dim, sizes: Sizes, rank: int, ranks: int) -> Indices:
    """Return which elements of a dimension one of the ranks holds that split it, in their order.

    Args:
        dim: of a tensor.
        sizes: of the layer.
        rank: number of the rank.
        ranks: how many there are.
    """
    # Parts that alternate are split as one: each rank has some of the groups.
    parts = [dim.size(sizes)] if dim.by else [part.size(sizes) for part in dim.parts]
    starts = np.cumsum([0, *parts])
    return np.concatenate([
        start + np.arange(size // ranks * rank, size // ranks * (rank + 1))
        for start, size in zip(starts, parts, strict=False)
    ])  # fmt: skip


def tensor_positions(one: Parameter, sizes: Sizes, kept: Kept) -> tuple[Indices | None, ...]:
    """Return which elements are kept along each dimension of a tensor; of one expert's.

    Args:
        one: the tensor.
        sizes: of the layer of the parent.
        kept: of its axes; of one expert, where it is one of experts (`of_expert`).
    """
    return tuple(positions(dim, sizes, kept) for dim in one.dims)
