"""Children of a model for tests: random sizes, what they keep, and their weights by slicing."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis, Sizes
from hybrid_train.anatomy.kinds import CHOSEN, EMBEDDING, HEAD, Parameter, final_norm, mtp_block
from hybrid_train.anatomy.layers import Layer, block_prefix, layers, main_layers
from hybrid_train.anatomy.selection import (
    Indices,
    Kept,
    KeptLayer,
    Selection,
    chosen,
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
from tests.tiny import VOCAB

_NO_PARTS = Sizes(**dict.fromkeys(Sizes._fields, 0))  # RMSNorm, no biases
(FINAL_NORM,) = final_norm(_NO_PARTS)
MTP_BLOCK = mtp_block(_NO_PARTS)

SIZES = {  # axis -> what a child of `roomy` may have of it; its MTP blocks have the first
    Axis.hidden: (12, 20, 28),
    Axis.ssm_heads: (2, 4, 6),
    Axis.ssm_head_dim: (6, 11),
    Axis.kv_groups: (1,),
    Axis.heads: (1, 3),  # of each group
    Axis.ffn: (17, 40),
    Axis.experts: (3, 2),
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


def roomy(model: Model) -> Model:
    """The model of `tests.tiny` with heads enough that some of each group can go."""
    attention = replace(model.attention, heads=8)
    return replace(
        model, attention=attention, mamba=replace(model.mamba, heads=8), vocab_size=VOCAB
    )


def child_of(
    model: Model, axes: Collection[Axis], random: np.random.Generator, dropped: Collection[int] = ()
) -> Model:
    """A model that is smaller along these axes, each main layer by sizes of its own.

    Layers of MTP blocks have the sizes of the first size of each axis. Main layers of the numbers
    that are dropped are not there.
    """
    pattern = parse(model.pattern)
    main = [one for one in main_layers(model) if one.number not in dropped]
    text = "".join(one.letter for one in main) + f"/{pattern.mtp}" * pattern.mtp_depths
    child = replace(model, pattern=text)
    first = {axis: SIZES[axis][0] for axis in axes}
    if Axis.hidden in axes:
        child.hidden_size = int(random.choice(SIZES[Axis.hidden]))
    if Axis.latent in axes:
        child.moe = replace(child.moe, latent_size=int(random.choice(SIZES[Axis.latent])))
    for letter, (section, _) in _RULES.items():
        setattr(child, section, replace(getattr(child, section), **_given(letter, first, model)))
    child.layers = []
    for number, one in enumerate(main, start=1):
        drawn = {axis: int(random.choice(SIZES[axis])) for axis in axes}
        section, rule = _RULES[one.letter]
        given = {name.rpartition(".")[2]: one.sizes.along(Axis(name)) for name in one.given}
        if given := given | _given(one.letter, drawn, model):
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
        stay = np.arange(of.along(groups))
        if groups is not Axis.ssm_groups:
            stay = kept[groups] = random.permutation(stay)[: number.along(groups)]
        share = of.along(members) // of.along(groups)
        left = number.along(members) // number.along(groups)
        kept[members] = np.concatenate([
            group * share + random.permutation(share)[:left] for group in stay
        ])  # fmt: skip
    if parent.letter == "E":
        kept[Axis.expert_ffn] = np.stack([
            random.permutation(of.expert_ffn)[: number.expert_ffn] for _ in range(number.experts)
        ])  # fmt: skip
    return KeptLayer(parent, child, kept)


def sliced(weights: Mapping[str, Tensor], selection: Selection) -> dict[str, Tensor]:
    """The weights of the child, from those of the whole parent, by the names of one process."""
    usual, shared = selection.layers[0].parent.sizes, selection.shared
    found = {}
    for layer in selection.layers:
        for old, new, one, kept in _tensors_of(layer, selection.of(layer)):
            found[new] = _cut(weights[old], one, layer.parent.sizes, kept)
    outer = {one.name: one for one in (EMBEDDING, *final_norm(usual), HEAD) if one.name in weights}
    for depth in {layer.child.depth for layer in selection.layers} - {0}:
        outer |= {block_prefix(depth) + one.name: one for one in mtp_block(usual)}
    return found | {name: _cut(weights[name], one, usual, shared) for name, one in outer.items()}


def _tensors_of(layer: KeptLayer, kept: Kept) -> Iterator[tuple[str, str, Parameter, Kept]]:
    """Names in the parent and in the child, kind, and what is kept of each tensor of a layer."""
    experts = chosen(kept, Axis.experts, layer.parent.sizes).tolist()
    for one in layer.parent.parameters:
        old, new = layer.parent.prefix + one.name, layer.child.prefix + one.name
        if one.of_experts:
            for number, expert in enumerate(experts):
                yield f"{old}{expert}", f"{new}{number}", one, of_expert(kept, number)
        else:
            yield old, new, one, kept


def _cut(value: Tensor, one: Parameter, sizes: Sizes, kept: Kept) -> Tensor:
    for dim, left in enumerate(tensor_positions(one, sizes, kept)):
        if left is not None:
            value = value.index_select(dim, torch.from_numpy(left))
    return value


def disturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every tensor of a model on one process values that differ, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("local_tokens_per_expert"):
                continue
            noise = torch.empty(value.shape).uniform_(-1, 1, generator=generator)
            value.add_(noise.to(value.dtype), alpha=0.3 if value.dim() < 2 else 0.05)
