"""The edit that lets a model compute what a smaller one made of it would, by a selection.

Hidden channels that are masked are 0 from the embedding to the head: the embedding gives none, and
no linear layer that writes to the hidden states has rows for them. A norm over n of N channels then
divides by the root mean square of the n; by that of all N, the small child would need eps * n / N
in its place, and a factor of sqrt(n / N) behind it. What is masked within a layer has neither rows
in the weight that makes it nor columns in the one that reads it. Masked experts are no choice of
the router, and a layer that is not there hands on what it is given.

Gradients are those of the child, too, and 0 where it has no weight. Masks are data on the device
that can be others in every step: nothing waits for the device, or asks it.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from hybrid_train.anatomy.axes import Axis, Dim, Sizes
from hybrid_train.anatomy.gemm_formats import MTP, Linear
from hybrid_train.anatomy.kinds import Parameter, weight_of
from hybrid_train.anatomy.selection import (
    Indices,
    Kept,
    KeptLayer,
    Selection,
    held_positions,
    of_expert,
    tensor_positions,
)
from hybrid_train.compression.choosing import choose
from hybrid_train.compression.ranking import FILE_NAME, read, write
from hybrid_train.megatron import hybrid, norms, plain
from hybrid_train.megatron.hybrid import Hybrid
from hybrid_train.megatron.mamba import MambaMixer
from hybrid_train.megatron.router import TopKRouter
from hybrid_train.model.edits import add_transform, linears_of
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.precision.emulated import OperandTransform, Stage
from hybrid_train.schema import pruning as schema
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.train import TrainJob

_Pair = tuple[Tensor | None, Tensor | None]  # of rows [O] and columns [I]; None: all are kept
_Layers = Mapping[tuple[int, int], KeptLayer]  # by depth and number in the parent


class WeightMask(OperandTransform):
    """Leaves some rows and columns of a weight."""

    def __init__(self) -> None:
        self.pairs: Sequence[_Pair] = ()  # of each local expert; of the one weight; none: all stays

    def weight(self, weight: Tensor, expert: int) -> Tensor:
        if not self.pairs:
            return weight
        rows, columns = self.pairs[expert]
        if rows is not None:
            weight = weight * rows[:, None]
        return weight if columns is None else weight * columns


class Mask:
    """Masks the chunks of a model on this process; every process makes the same calls."""

    stage = Stage.mask

    def __init__(self, selection: Selection) -> None:
        """Take what is kept of the model."""
        self.selection = selection
        self._chunks: Sequence[Hybrid] = ()
        self._transforms: dict[Linear, WeightMask] = {}

    def apply(self, chunks: Sequence[Module]) -> None:
        """Mask chunks as they were built.

        Raises:
            UserError: if a linear or a norm is one of Transformer Engine.
        """
        self._chunks = chunks  # type: ignore[assignment]
        for chunk in chunks:
            _require_plain_norms(chunk)
        for linear, module in linears_of(chunks):
            self._transforms[linear] = WeightMask()
            add_transform(linear, module, self._transforms[linear])
        self.use(self.selection)

    def use(self, selection: Selection) -> None:
        """Mask by another selection from here on; what was masked before is kept again."""
        self.selection = selection
        kept = {(one.parent.depth, one.parent.number): one for one in selection.layers}
        for chunk in self._chunks:
            place = _place_of(chunk)
            _mask_hidden(chunk, selection, place)
            chunk.runs_mtp = any(depth for depth, _ in kept)
            for depth, number, layer in plain.layer_modules(chunk):
                if depth == 0:
                    hybrid.skip(layer, skipped=(depth, number) not in kept)
                if (depth, number) in kept:
                    _mask_layer(layer, kept[depth, number], place)
            for linear, _ in linears_of([chunk]):
                self._transforms[linear].pairs = _pairs_of(linear, selection, kept, place)


def mask_of_run(settings: schema.Mask, job: TrainJob, run_dir: Path, vocab_size: int) -> Mask:
    """Build the mask that a run lists among its edits."""
    return Mask(selection_of_run(settings, job, run_dir, vocab_size))


def selection_of_run(
    settings: schema.Mask, job: TrainJob, run_dir: Path | None, vocab_size: int
) -> Selection:
    """Choose what a mask leaves of the model of a run.

    Args:
        settings: one of the edits of the job.
        job: the run.
        run_dir: its folder, which has the ranking that the run began with; None: it begins.
        vocab_size: of the model, without padding; embedding and head count.

    Raises:
        ConfigError: if no child of the model is as asked, or the objective trains what is masked.
        UserError: if there is no such ranking, or it is of another model.
    """
    place = f"edits.{job.edits.index(settings)}"
    if sum(isinstance(one, schema.Mask) for one in job.edits) > 1:
        raise ConfigError([Problem(place, "mask", "must be the only mask of the run")])
    drops = settings.mtp is schema.MtpBlocks.drop and parse(job.model.pattern).mtp_depths > 0
    if drops and job.objective.trains_mtp:
        rule = f"must be keep: objective {job.objective.kind} trains the MTP blocks"
        raise ConfigError([Problem(f"{place}.mtp", "drop", rule, "keep")])
    rows = padded_vocab_size(vocab_size, job.model.vocab_multiple)
    ranking = None
    if settings.ranking is not None:
        own = run_dir is not None and (run_dir / schema.MASK_RANKING / FILE_NAME).is_file()
        ranking = read(run_dir / schema.MASK_RANKING if run_dir and own else Path(settings.ranking))
    try:
        return choose(job.model, ranking, settings, rows).selection
    except ConfigError as error:
        raise ConfigError([one.under(place) for one in error.problems]) from error


def keep_ranking(job: TrainJob, run_dir: Path) -> None:
    """Copy the ranking that the mask of a new run is chosen by into its folder.

    So the mask is the same in every later attempt, and wherever the run is loaded.
    """
    shutil.rmtree(run_dir / schema.MASK_RANKING, ignore_errors=True)
    for one in job.edits:
        if isinstance(one, schema.Mask) and one.ranking is not None:
            (run_dir / schema.MASK_RANKING).mkdir()
            write(read(Path(one.ranking)), run_dir / schema.MASK_RANKING)


@dataclass(frozen=True)
class _Place:
    """Which shards a process holds, and where masks go.

    Attributes:
        tensor: rank among the tensor ranks, and how many these are.
        of_experts: the same for the weights of experts.
        expert: rank among the expert ranks, and how many these are.
        device: of the weights.
        dtype: of the weights.
    """

    tensor: tuple[int, int]
    of_experts: tuple[int, int]
    expert: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    def send(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Return values on the device, without waiting for it."""
        there = torch.from_numpy(np.asarray(values)).to(dtype or self.dtype)
        if self.device.type == "cuda":
            there = there.pin_memory()  # of other memory a copy waits for the device
        return there.to(self.device, non_blocking=True)

    def mask(self, dim: Dim, chosen: Indices | None, sizes: Sizes, shard: tuple[int, int]) -> Any:
        """Return what of the elements of a dimension that are here is kept; None: all."""
        if chosen is None:
            return None
        stays = np.zeros(dim.size(sizes), dtype=np.float32)
        stays[chosen] = 1
        return self.send(stays[held_positions(dim, sizes, *shard)])

    def pair(self, one: Parameter, sizes: Sizes, kept: Kept) -> _Pair:
        """Return the masks of this rank's part of a weight."""
        split = self.of_experts if one.of_experts else self.tensor
        rows, columns = (
            self.mask(dim, chosen, sizes, split if number == one.split else (0, 1))
            for number, (dim, chosen) in enumerate(
                zip(one.dims, tensor_positions(one, sizes, kept), strict=True)
            )
        )
        return rows, columns


def _place_of(chunk: Hybrid) -> _Place:
    groups = chunk.pg_collection
    weight = next(chunk.parameters())
    tensor, of_experts, expert = (
        (group.rank(), group.size()) for group in (groups.tp, groups.expt_tp, groups.ep)
    )
    return _Place(tensor, of_experts, expert, weight.device, chunk.config.params_dtype)


def _require_plain_norms(chunk: Module) -> None:
    for name, module in chunk.named_modules():
        is_ours = isinstance(module, norms.Norm | norms.GatedNorm)
        if hasattr(module, "eps") and not is_ours:
            raise UserError(
                f"{name} is a {type(module).__name__}, whose mean is over all channels, masked or "
                "not: set runtime.kernels=plain"
            )


def _mask_hidden(chunk: Hybrid, selection: Selection, place: _Place) -> None:
    """Mask hidden channels where they begin, and tell all norms over them how many are left."""
    chunk.channels, channels = None, None
    if selection.hidden is not None:
        stays = np.zeros(chunk.config.hidden_size, dtype=np.float32)
        stays[selection.hidden] = 1
        chunk.channels = place.send(stays)
        channels = place.send(len(selection.hidden), torch.float32)
    for module in chunk.modules():
        if isinstance(module, norms.LayerNorm | plain.LayerNormColumnLinear):
            module.channels = chunk.channels  # what is masked would differ from 0 behind it
        elif isinstance(module, norms.HeadNorm):
            continue  # whose channels are those of a head
        elif isinstance(module, norms.Norm | plain.NormColumnLinear):
            module.channels = channels


def _mask_layer(layer: Any, kept: KeptLayer, place: _Place) -> None:
    """Mask what a layer has beside its linears: the norm of its scan, and its router."""
    for module in layer.modules():
        if isinstance(module, MambaMixer):
            left = kept.child.sizes
            channels = left.ssm_heads * left.ssm_head_dim // left.ssm_groups
            module.norm.channels = place.send(channels, torch.float32)
        elif isinstance(module, TopKRouter):
            experts = kept.kept.get(Axis.experts)
            if experts is None:
                module.kept = None
                continue
            stays = np.zeros(kept.parent.sizes.experts, dtype=bool)
            stays[experts] = True
            module.kept = place.send(stays, torch.bool)


def _pairs_of(
    linear: Linear, selection: Selection, layers: _Layers, place: _Place
) -> Sequence[_Pair]:
    """Return the masks of a linear layer; nothing for one that no layer of the child has."""
    if linear.layer == 0:  # of an MTP block, beside its layers
        usual = selection.layers[0].parent.sizes
        return [place.pair(weight_of(linear.module, usual), usual, selection.shared)]
    found = layers.get((linear.depth, linear.layer))
    if found is None:
        return []
    sizes, kept = found.parent.sizes, selection.of(found)
    one = weight_of(linear.module.removeprefix(f"{MTP}."), sizes)
    if not one.of_experts:
        return [place.pair(one, sizes, kept)]
    rank, ranks = place.expert
    here = sizes.experts // ranks
    experts = kept.get(Axis.experts)
    left = list(range(sizes.experts)) if experts is None else experts.tolist()
    return [
        # An expert that is not left is met by no token, whatever its weights are.
        place.pair(one, sizes, of_expert(kept, left.index(expert))) if expert in left
        else (None, None)
        for expert in range(here * rank, here * (rank + 1))
    ]  # fmt: skip
