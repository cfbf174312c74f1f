"""The layers of a child and their sizes, as they follow from its parent; and what cannot be cut.

A size for all layers is a bound: a layer of the parent that is smaller stays as it is. A size that
a rule gives to some layers is meant for each of them.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from hybrid_train.anatomy.axes import Axis, Sizes
from hybrid_train.anatomy.layers import Layer, layers
from hybrid_train.anatomy.selection import CHOSEN
from hybrid_train.schema.layer_ranges import layers_of
from hybrid_train.schema.model import LAYER_KINDS, SECTIONS, LayerRule, Model
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.pruning import Cut, Depth, MtpBlocks
from hybrid_train.schema.units import counted

# Axes of channels and neurons, which kernels want in multiples; heads and experts are counted.
CHANNELS = (
    Axis.hidden, Axis.ffn, Axis.expert_ffn, Axis.shared_ffn, Axis.latent, Axis.ssm_head_dim,
)  # fmt: skip
LEAST_MULTIPLE = 8  # 16 bytes of bfloat16, which loads of GPU kernels are aligned to
_WORDS = {kind.letter: kind.words for kind in LAYER_KINDS}


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


# --- what cannot be cut -------------------------------------------------------------------------


def multiple_of(cut: Cut) -> int:
    """Return what sizes in channels must be multiples of."""
    return cut.multiple or LEAST_MULTIPLE


def size_problems(parent: Model, plan: Plan, multiple: int) -> Iterator[Problem]:
    """Yield the sizes that no child of this parent can have, each with the nearest legal one.

    Args:
        parent: the model that is cut.
        plan: what is asked.
        multiple: of sizes in channels.
    """
    here = staying(parent, plan)
    num_main = len(parse(parent.pattern).main)
    for axis, size in plan.sizes.items():
        largest = _largest(parent, here, axis)
        yield from _beyond(Asked(size, axis.setting, of_rule=False), axis, largest, multiple)
    deciding = set()
    told = set()
    for layer in here:
        asked = asked_of(layer, plan, num_main)
        deciding |= {one.path.split(".")[2] for one in asked.values() if one.of_rule}
        found = [
            problem
            for axis, one in asked.items()
            if one.of_rule
            for problem in _beyond(one, axis, layer.sizes.along(axis), multiple)
        ]
        found = found or [*_within_layer(layer, asked)]
        yield from (one for one in found if one.path not in told)
        told |= {one.path for one in found}
    for number, rule in enumerate(plan.rules):
        if str(number) not in deciding:
            words = "matches no layer that stays with such sizes, or none that is left for it"
            yield Problem(
                f"model.layers.{number}", str(rule), words if rule.given else "gives no size"
            )


def _largest(parent: Model, here: Sequence[Layer], axis: Axis) -> int:
    if axis is Axis.hidden:
        return parent.hidden_size
    return max((one.sizes.along(axis) for one in here if axis in CHOSEN[one.letter]), default=0)


def _beyond(one: Asked, axis: Axis, largest: int, multiple: int) -> Iterator[Problem]:
    """Yield what is wrong with a size by itself."""
    if not largest:
        yield Problem(one.path, one.size, "is of something that the parent does not have", "null")
    elif one.size > largest:
        rule = f"must be at most {largest}, the parent's: a cut makes nothing larger"
        yield Problem(one.path, one.size, rule, largest)
    elif axis in CHANNELS and one.size % multiple and one.size != largest:
        rule = f"must be a multiple of {multiple} (multiple)"
        yield Problem(one.path, one.size, rule, nearest_multiple(one.size, multiple, largest))


def nearest_multiple(size: int, multiple: int, largest: int) -> int:
    """Return the multiple nearest to a size, at least one; or the largest, if that is nearer."""
    below = max(size // multiple * multiple, multiple)
    legal = {one for one in (below, below + multiple) if one <= largest} | {largest}
    return min(legal, key=lambda one: (abs(one - size), one))


def _within_layer(layer: Layer, asked: Mapping[Axis, Asked]) -> Iterator[Problem]:
    """Yield what sizes of one layer make of each other."""
    sizes = child_sizes(layer, asked, layer.sizes.hidden)
    if layer.kind.groups:
        groups, members = layer.kind.groups
        yield from _group_problems(layer, sizes, asked.get(members), (groups, members))
    if Axis.experts in asked and sizes.experts < sizes.top_k:
        one = asked[Axis.experts]
        rule = f"must be at least {sizes.top_k}, the experts of a token (model.moe.top_k)"
        yield Problem(one.path, one.size, rule, sizes.top_k)


def _group_problems(
    layer: Layer, sizes: Sizes, one: Asked | None, pair: tuple[Axis, Axis]
) -> Iterator[Problem]:
    if one is None:  # then groups go whole, or nothing does
        return
    groups, members = pair
    number, size = sizes.along(groups), sizes.along(members)
    most = layer.sizes.along(members) // layer.sizes.along(groups)
    if size % number == 0 and size <= most * number:
        return
    legal = nearest_multiple(min(size, most * number), number, most * number)
    rule = (
        f"must be a multiple of {groups.value} ({number}), at most {most} for each: heads stay "
        "in their groups, all of which keep as many"
    )
    yield Problem(one.path, one.size, rule, legal)


def depth_problems(parent: Model, cut: Cut) -> Iterator[Problem]:
    """Yield what a cut says of layers and MTP blocks that the parent does not have."""
    written = parse(parent.pattern)
    if cut.mtp is MtpBlocks.drop and not written.mtp:
        yield Problem("mtp", "drop", "drops what the parent does not have: MTP blocks", "keep")
    number, depth = len(written.main), cut.depth
    found = [*_listed_problems(depth, number), *_counted_problems(depth, written.main)]
    yield from (replace(one, path=f"depth.{one.path}") for one in found)
    if not found and (depth.drop or depth.keep):
        kept = listed_layers(depth, number)
        way = "keep" if depth.keep else "drop"
        if not kept:
            yield Problem(f"depth.{way}", getattr(depth, way), "leaves no layer")


def _listed_problems(depth: Depth, number: int) -> Iterator[Problem]:
    for way in ("drop", "keep"):
        for place, text in enumerate(getattr(depth, way)):
            last = text.strip().rpartition("-")[2]
            beyond = last.isdigit() and int(last) > number
            if beyond or not layers_of(text, number):
                rule = f"the parent has {counted(number, 'main layer')}"
                nearest = str(number) if text.strip().isdigit() else None
                yield Problem(f"{way}.{place}", text, rule, nearest)


def _counted_problems(depth: Depth, main: str) -> Iterator[Problem]:
    number = len(main)
    for name, value in (("layers", depth.layers), ("block", depth.block)):
        if value is not None and value >= number:
            rule = f"must be less than {number}, the main layers of the parent"
            yield Problem(name, value, rule, max(number - 1, 1))
    of_kinds = depth.of_kinds
    for letter, value in of_kinds.items():
        if value > main.count(letter):
            rule = (
                f"must be at most {main.count(letter)}, the {_WORDS[letter]} layers of the parent"
            )
            yield Problem(SECTIONS[letter], value, rule, main.count(letter))
    others = sum(letter not in of_kinds for letter in main)
    if depth.layers is not None and depth.layers - sum(of_kinds.values()) > others:
        most = sum(of_kinds.values()) + others
        rule = f"must be at most {most}: {counted(others, 'layer')} of other kinds, and the counts"
        yield Problem("layers", depth.layers, rule, most)
    if of_kinds and not sum(of_kinds.values()) and not others:
        yield Problem(SECTIONS[next(iter(of_kinds))], 0, "leaves no layer", 1)


def listed_layers(depth: Depth, number: int) -> list[int]:
    """Return the layers that a list leaves of so many, from 1."""
    texts = depth.keep or depth.drop
    named = {one for text in texts for one in layers_of(text, number)}
    return [one for one in range(1, number + 1) if (one in named) is bool(depth.keep)]


def power_near(size: int) -> int:
    """Return the power of two near a 32nd of a size, the step of what a search tries."""
    return max(LEAST_MULTIPLE, 2 ** int(math.log2(max(size // 32, 1))))
