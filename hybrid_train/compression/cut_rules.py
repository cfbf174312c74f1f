"""Rules of a cut: what no child of a parent can be, and what one rules out for later.

Sizes that nothing could run are refused with the nearest legal one. What a layout or a number
format does not take, and another does, is a remark: who trains the child chooses those.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hybrid_train.anatomy.axes import Axis, Sizes
from hybrid_train.anatomy.kinds import CHOSEN
from hybrid_train.anatomy.layers import Layer, distinct
from hybrid_train.compression.child_sizes import (
    Asked,
    Plan,
    asked_of,
    child_sizes,
    listed_layers,
    staying,
)
from hybrid_train.config.checks import split_problems
from hybrid_train.config.rules_of_precision import MULTIPLES
from hybrid_train.schema.layer_ranges import layers_of
from hybrid_train.schema.model import LAYER_KINDS, SECTIONS, Model, Moe
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.pruning import Cut, Depth, MtpBlocks
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted

# Axes of channels and neurons, which kernels want in multiples; heads and experts are counted.
CHANNELS = (
    Axis.hidden, Axis.ffn, Axis.expert_ffn, Axis.shared_ffn, Axis.latent, Axis.ssm_head_dim,
)  # fmt: skip
LEAST_MULTIPLE = 8  # 16 bytes of bfloat16, which loads of GPU kernels are aligned to
_WORDS = {kind.letter: kind.words for kind in LAYER_KINDS}
_DEGREES = (2, 4, 8, 16, 32, 64)


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
        yield Problem(one.path, one.size, "is of no layer that stays", "null")
    elif one.size > largest:
        rule = f"must be at most {largest}, the parent's: a cut makes nothing larger"
        yield Problem(one.path, one.size, rule, largest)
    elif axis in CHANNELS and one.size % multiple and one.size != largest:
        rule = f"must be a multiple of {multiple}; multiple=1 takes any"
        yield Problem(one.path, one.size, rule, _nearest_legal(one.size, multiple, largest))


def _nearest_legal(size: int, multiple: int, largest: int) -> int:
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
    legal = _nearest_legal(min(size, most * number), number, most * number)
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
    depth = cut.depth
    found = list(together_problems(written, depth.together))
    found = found or [*_listed_problems(depth, written.main), *_counted_problems(depth, written)]
    yield from (replace(one, path=f"depth.{one.path}") for one in found)
    if not found and (depth.drop or depth.keep):
        kept = listed_layers(depth, len(written.main))
        way = "keep" if depth.keep else "drop"
        if not kept:
            yield Problem(f"depth.{way}", getattr(depth, way), "leaves no layer")


def together_problems(pattern: Pattern, together: int) -> Iterator[Problem]:
    """Yield what keeps so many neighbours of a model from going together."""
    if together > 1 and not pattern.repeats(together):
        legal = [1, *(one for one in range(2, len(pattern.main)) if pattern.repeats(one))]
        rule = "must be so many layers that the pattern repeats them; 2 of *-*-*-"
        yield Problem("together", together, rule, min(legal, key=lambda one: abs(one - together)))


def _all_of(depth: Depth, main: str) -> tuple[int, str]:
    """Return how many there are that stay or go as one, and that in words: "6 main layers"."""
    number = len(main) // depth.together
    if depth.together == 1:
        return number, counted(number, "main layer")
    return number, f"{counted(number, 'group')} of {depth.together} main layers"


def _listed_problems(depth: Depth, main: str) -> Iterator[Problem]:
    number, words = _all_of(depth, main)
    for way in ("drop", "keep"):
        for place, text in enumerate(getattr(depth, way)):
            last = text.strip().rpartition("-")[2]
            beyond = last.isdigit() and int(last) > number
            if beyond or not layers_of(text, number):
                rule = f"the parent has {words}"
                nearest = str(number) if text.strip().isdigit() else None
                yield Problem(f"{way}.{place}", text, rule, nearest)


def _counted_problems(depth: Depth, pattern: Pattern) -> Iterator[Problem]:
    main = pattern.main
    number, words = _all_of(depth, main)
    for name, value in (("layers", depth.layers), ("block", depth.block)):
        if value is not None and value >= number:
            rule = f"must be less than {number}: the parent has {words}"
            yield Problem(name, value, rule, max(number - 1, 1))
    of_kinds = depth.of_kinds
    for letter, value in of_kinds.items():
        if value > main.count(letter):
            rule = (
                f"must be at most {main.count(letter)}, the {_WORDS[letter]} layers of the parent"
            )
            yield Problem(SECTIONS[letter], value, rule, main.count(letter))
    others = sum(letter not in of_kinds for letter in main[:: depth.together])
    if depth.layers is not None and depth.layers - sum(of_kinds.values()) > others:
        most = sum(of_kinds.values()) + others
        rule = f"must be at most {most}: {counted(others, 'layer')} of other kinds, and the counts"
        yield Problem("layers", depth.layers, rule, most)
    if of_kinds and not sum(of_kinds.values()) and not others:
        yield Problem(SECTIONS[next(iter(of_kinds))], 0, "leaves no layer", 1)


def remarks(parent: Model, child: Model) -> Iterator[str]:
    """Yield a sentence for each layout and number format that takes the parent and not the child.

    Args:
        parent: the model that was cut.
        child: what came of it.
    """
    has_experts = Moe.letter in child.pattern
    for name in ("tensor", "expert") if has_experts else ("tensor",):
        for degree in _DEGREES:
            theirs, ours = (_refusals(model, name, degree) for model in (parent, child))
            if theirs:
                break
            if ours:
                yield f"parallel.{name}={degree} takes the parent and not the child: it {ours[0]}"
                break
    told: set[str] = set()
    for multiple, group in itertools.groupby(sorted(MULTIPLES, key=_of_format), key=_of_format):
        uneven = _uneven(child, multiple) - _uneven(parent, multiple)
        new = sorted(one for one in uneven if one not in told)
        told |= uneven
        if new:
            formats = ", ".join(one.value for one in group)
            yield f"{formats} on a GPU take multiples of {multiple} only, not {', '.join(new)}"


def _refusals(model: Model, name: str, degree: int) -> list[str]:
    job = TrainJob(model=model)
    setattr(job.parallel, name, degree)
    return [problem.rule for problem in split_problems(job, degree)]


def _of_format(one: GemmFormat) -> int:
    return MULTIPLES[one]


def _uneven(model: Model, multiple: int) -> set[str]:
    """Name the sizes of linear layers that are no multiple of a number: "model.hidden_size=88"."""
    return {
        f"{axis.setting}={layer.sizes.along(axis)}"
        for layer in distinct(model)
        for one in layer.parameters
        if one.linear
        for whole in one.dims
        if (axis := whole.grows_with) and whole.size(layer.sizes) % multiple
    }
