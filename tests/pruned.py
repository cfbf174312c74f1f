"""Children of a model for tests: random sizes, what they keep, and their weights by slicing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis, Sizes
from hybrid_train.anatomy.kinds import EMBEDDING, FINAL_NORM, HEAD, MTP_BLOCK, Parameter
from hybrid_train.anatomy.layers import Layer, block_prefix, layers, main_layers, mtp_blocks
from hybrid_train.anatomy.selection import (
    CHOSEN,
    Indices,
    KeptLayer,
    Selection,
    of_expert,
    tensor_positions,
)
from hybrid_train.schema.model import (
    AttentionSizes,
    LayerRule,
    MambaSizes,
    MlpSizes,
    Model,
    MoeSizes,
)
from hybrid_train.schema.pattern import parse

SIZES = {  # axis -> what a child of `tests.tiny` may have of it, from the fewest on
    Axis.hidden: (12, 20, 28),
    Axis.ssm_heads: (2,),
    Axis.ssm_head_dim: (6, 11),
    Axis.kv_groups: (1,),
    Axis.heads: (1, 2),  # of each group
    Axis.ffn: (17, 40),
    Axis.experts: (2, 3),
    Axis.expert_ffn: (9, 20),
    Axis.shared_ffn: (13, 30),
    Axis.latent: (7, 12),
}
_RULES: dict[str, tuple[str, Any]] = {
    "*": ("attention", AttentionSizes),
    "M": ("mamba", MambaSizes),
    "-": ("mlp", MlpSizes),
    "E": ("moe", MoeSizes),
}


def child_of(
    model: Model, axes: Collection[Axis], random: np.random.Generator, dropped: Collection[int] = ()
) -> Model:
    """A model that is smaller along these axes, each main layer by sizes of its own.

    Layers of MTP blocks have the sizes of the first size of each axis. Main layers of the numbers
    that are dropped are not there.
    """
    pattern = parse(model.pattern)
    main = [(n, letter) for n, letter in enumerate(pattern.main, start=1) if n not in dropped]
    text = "".join(letter for _, letter in main) + f"/{pattern.mtp}" * pattern.mtp_depths
    child = replace(model, pattern=text)
    first = {axis: SIZES[axis][0] for axis in axes}
    if Axis.hidden in axes:
        child.hidden_size = int(random.choice(SIZES[Axis.hidden]))
    if Axis.latent in axes:
        child.moe = replace(child.moe, latent_size=int(random.choice(SIZES[Axis.latent])))
    for letter, (section, _) in _RULES.items():
        setattr(child, section, replace(getattr(child, section), **_given(letter, first, model)))
    child.layers = []
    for number, (_, letter) in enumerate(main, start=1):
        drawn = {axis: int(random.choice(SIZES[axis])) for axis in axes}
        section, rule = _RULES[letter]
        given = _given(letter, drawn, model)
        if given:
            child.layers.append(LayerRule(layers=str(number), **{section: rule(**given)}))
    return child


def _given(letter: str, drawn: Mapping[Axis, int], model: Model) -> dict[str, int]:
    """Sizes of a section; heads of attention are drawn by group."""
    drawn = dict(drawn)
    if letter == "*" and {Axis.heads, Axis.kv_groups} & drawn.keys():
        share = model.attention.heads // model.attention.kv_heads
        groups = drawn.get(Axis.kv_groups, model.attention.kv_heads)
        drawn[Axis.heads] = groups * drawn.get(Axis.heads, share)
    own = [axis for axis in CHOSEN[letter] if axis in drawn and axis is not Axis.latent]
    return {axis.value.rpartition(".")[2]: drawn[axis] for axis in own}


def selection_of(
    parent: Model, child: Model, random: np.random.Generator, dropped: Collection[int] = ()
) -> Selection:
    """What the child keeps of the parent, drawn at random, in an order of its own."""
    left = [one for one in main_layers(parent) if one.number not in dropped]
    if parse(child.pattern).mtp_depths:
        left += [one for one in layers(parent) if one.depth > 0]
    kept = [_kept(a, b, random) for a, b in zip(left, layers(child), strict=True)]
    hidden = None
    if child.hidden_size < parent.hidden_size:
        hidden = random.permutation(parent.hidden_size)[: child.hidden_size]
    return Selection(tuple(kept), hidden)


def _kept(parent: Layer, child: Layer, random: np.random.Generator) -> KeptLayer:
    of, number = parent.sizes, child.sizes
    kept: dict[Axis, Indices] = {}
    for axis in CHOSEN[parent.letter]:
        if axis is Axis.expert_ffn or number.along(axis) == of.along(axis) == 0:
            continue
        if parent.kind.groups is None or axis not in parent.kind.groups:
            kept[axis] = random.permutation(of.along(axis))[: number.along(axis)]
    if parent.kind.groups is not None:
        groups, members = parent.kind.groups
        chosen = random.permutation(of.along(groups))[: number.along(groups)]
        if groups is Axis.ssm_groups:  # stay
            chosen = np.arange(of.along(groups))
        else:
            kept[groups] = chosen
        share = of.along(members) // of.along(groups)
        left = number.along(members) // number.along(groups)
        kept[members] = np.concatenate([
            group * share + random.permutation(share)[:left] for group in chosen
        ])  # fmt: skip
    if parent.letter == "E":
        kept[Axis.expert_ffn] = np.stack([
            random.permutation(of.expert_ffn)[: number.expert_ffn] for _ in range(number.experts)
        ])  # fmt: skip
    return KeptLayer(parent, child, kept)


def sliced(weights: Mapping[str, Tensor], selection: Selection, child: Model) -> dict[str, Tensor]:
    """The weights of the child, from those of the whole parent, by the names of one process."""
    usual, found = selection.layers[0].parent.sizes, {}

    def take(old: str, new: str, one: Parameter, sizes: Sizes, kept: Any) -> None:
        value = weights[old]
        for dim, chosen in enumerate(tensor_positions(one, sizes, kept)):
            if chosen is not None:
                value = value.index_select(dim, torch.from_numpy(chosen))
        found[new] = value

    for layer in selection.layers:
        sizes, kept = layer.parent.sizes, selection.of(layer)
        experts = kept.get(Axis.experts, np.arange(sizes.experts))
        for one in layer.parent.parameters:
            old, new = layer.parent.prefix + one.name, layer.child.prefix + one.name
            if not one.of_experts:
                take(old, new, one, sizes, kept)
                continue
            for number, expert in enumerate(experts.tolist()):
                own = of_expert(kept, number)
                take(f"{old}{expert}", f"{new}{number}", one, sizes, own)
    for one in (EMBEDDING, FINAL_NORM, HEAD):
        if one.name in weights:
            take(one.name, one.name, one, usual, selection.shared)
    for depth in range(1, mtp_blocks(child) + 1):
        for one in MTP_BLOCK:
            name = block_prefix(depth) + one.name
            take(name, name, one, usual, selection.shared)
    return found


def disturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every tensor of a model on one process values that differ, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("local_tokens_per_expert"):
                continue
            noise = torch.empty(value.shape).uniform_(-1, 1, generator=generator)
            value.add_(noise.to(value.dtype), alpha=0.3 if value.dim() < 2 else 0.05)


def names_of(selections: Sequence[Selection]) -> list[str]:
    """Short names of selections."""
    return [f"{len(one.layers)} layers" for one in selections]
