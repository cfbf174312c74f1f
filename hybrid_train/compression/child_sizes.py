"""The layers of a child, their sizes and its model section, as they follow from its parent.

A size for all layers is a bound: a layer of the parent that is smaller stays as it is. A size that
a rule gives to some layers is meant for each of them.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from hybrid_train.anatomy.axes import Axis, Sizes
from hybrid_train.anatomy.kinds import CHOSEN
from hybrid_train.anatomy.layers import Layer, layers
from hybrid_train.schema.layer_ranges import layers_of, layers_of_groups
from hybrid_train.schema.model import SECTIONS, Attention, LayerRule, Model, Rope
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.pruning import Cut, Depth, MtpBlocks


@dataclass(frozen=True)
class Plan:
    """What is asked of a child.

    Attributes:
        main: the main layers of the parent that stay, from 1, in their order.
        mtp: whether the MTP blocks stay.
        sizes: for all layers, by the axis.
        rules: sizes of some layers, which are counted in the parent.
    """

    main: tuple[int, ...]
    mtp: bool
    sizes: Mapping[Axis, int]
    rules: Sequence[LayerRule] = ()


@dataclass(frozen=True)
class Asked:
    """A size that is asked of a layer.

    Attributes:
        size: how many.
        path: of the setting.
        of_rule: whether it is meant for this layer, and not a bound for all.
    """

    size: int
    path: str
    of_rule: bool


def listed_layers(depth: Depth, number: int) -> list[int]:
    """Return the layers that a list leaves of so many, from 1; it may count groups of them."""
    texts, groups = depth.keep or depth.drop, number // depth.together
    named = {one for text in texts for one in layers_of(text, groups)}
    left = [one for one in range(1, groups + 1) if (one in named) is bool(depth.keep)]
    return layers_of_groups(left, depth.together)


def plan_of(parent: Model, cut: Cut, main: Sequence[int]) -> Plan:
    """Return what a cut asks, with the main layers that were chosen to stay."""
    sizes = {Axis(name): size for name, size in cut.model.given.items()}
    has_mtp = bool(parse(parent.pattern).mtp)
    return Plan(tuple(main), has_mtp and cut.mtp is MtpBlocks.keep, sizes, cut.model.layers)


def staying(parent: Model, plan: Plan) -> list[Layer]:
    """Return the layers of the parent that stay: main ones, then those of the MTP blocks."""
    main = set(plan.main)
    return [one for one in layers(parent) if (plan.mtp if one.depth else one.number in main)]


def asked_of(layer: Layer, plan: Plan, num_main: int) -> dict[Axis, Asked]:
    """Return what is asked of a layer, by the axis.

    Args:
        layer: of the parent.
        plan: what is asked.
        num_main: main layers of the parent.
    """
    axes = CHOSEN[layer.letter]
    found = {
        axis: Asked(size, axis.setting, of_rule=False)
        for axis, size in plan.sizes.items()
        if axis in axes
    }
    for number, rule in enumerate(plan.rules):
        own = {axis: rule.given[axis.value] for axis in axes if axis.value in rule.given}
        if own and _reaches(rule, layer, num_main):
            for axis, size in own.items():
                found[axis] = Asked(size, f"model.layers.{number}.{axis.value}", of_rule=True)
            break  # as of the rules of a model: the first one holds
    return found


def _reaches(rule: LayerRule, layer: Layer, num_main: int) -> bool:
    if layer.depth:
        return rule.layers.strip() == "all"
    return layer.number in layers_of(rule.layers, num_main)


def child_sizes(layer: Layer, asked: Mapping[Axis, Asked], hidden: int) -> Sizes:
    """Return the sizes that a layer of the parent gets.

    Where groups go whole, and nothing is said of their members, those that stay keep all of theirs.

    Args:
        layer: of the parent.
        asked: of it.
        hidden: channels of the child.
    """
    own = layer.sizes
    found = {axis: min(one.size, own.along(axis)) for axis, one in asked.items()}
    if layer.kind.groups:
        groups, members = layer.kind.groups
        if groups in found and members not in found:
            found[members] = own.along(members) // own.along(groups) * found[groups]
    return own._replace(hidden=hidden, **{axis.name: size for axis, size in found.items()})


def child_layers(parent: Model, plan: Plan) -> list[tuple[Layer, Sizes]]:
    """Return the layers of the parent that stay, each with the sizes that it gets."""
    num_main = len(parse(parent.pattern).main)
    hidden = plan.sizes.get(Axis.hidden, parent.hidden_size)
    return [
        (layer, child_sizes(layer, asked_of(layer, plan, num_main), hidden))
        for layer in staying(parent, plan)
    ]


def child_model(parent: Model, plan: Plan) -> Model:
    """Return the model section of the child.

    Sizes of a kind are those of its MTP block, else those that most of its layers have; the others
    get a rule, as few as can be.
    """
    found = child_layers(parent, plan)
    written = parse(parent.pattern)
    main = "".join(layer.letter for layer, _ in found if not layer.depth)
    mtp = (written.mtp, written.mtp_depths) if plan.mtp else ("", 0)
    model = copy.deepcopy(parent)
    model.pattern = str(Pattern((main,), *mtp))
    model.hidden_size = plan.sizes.get(Axis.hidden, parent.hidden_size)
    model.layers = []
    if Attention.letter not in model.pattern:
        model.attention.rope = Rope()
    for letter in SECTIONS:
        of_kind = [(layer, sizes) for layer, sizes in found if layer.letter == letter]
        if not of_kind:
            continue
        usual = _usual(of_kind)
        for axis in CHOSEN[letter]:
            section, _, name = axis.value.partition(".")
            setattr(getattr(model, section), name, usual.along(axis) or None)
        numbered = enumerate((one for one in found if not one[0].depth), start=1)
        here = [(number, sizes) for number, (one, sizes) in numbered if one.letter == letter]
        model.layers += _rules(letter, here, usual)
    return model


def _usual(of_kind: Sequence[tuple[Layer, Sizes]]) -> Sizes:
    """Return the sizes that stand in the section of a kind."""
    of_block = [sizes for layer, sizes in of_kind if layer.depth]
    if of_block:  # which no rule reaches but one for all
        return of_block[0]
    return Counter(sizes for _, sizes in of_kind).most_common(1)[0][0]


def _rules(letter: str, here: Iterable[tuple[int, Sizes]], usual: Sizes) -> Iterator[LayerRule]:
    """Yield a rule for each run of layers whose sizes are the same, and not the usual ones."""
    section = SECTIONS[letter]
    for sizes, run in groupby(here, key=lambda one: one[1]):
        if sizes == usual:
            continue
        numbers = [number for number, _ in run]
        rule = LayerRule(layers="-".join(map(str, sorted({numbers[0], numbers[-1]}))))
        own: Any = getattr(rule, section)
        for one in fields(own):
            axis = Axis(f"{section}.{one.name}")
            if sizes.along(axis) != usual.along(axis):
                setattr(own, one.name, sizes.along(axis))
        yield rule
