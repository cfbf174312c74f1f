"""Edits: what changes a built model before it is wrapped, and how several meet in a linear layer.

Edits act in the order of their stages. In a linear layer they transform the operands one after the
other; the GEMM comes last, of quantized operands where an edit asks for it:

    y = gemm(input_n(... input_1(x)), weight_n(... weight_1(W)))

Parameters stay as they are, so checkpoints know nothing of it. Autograd passes through the
transforms. A linear of Transformer Engine takes its weight into its own kernels, where nothing can
be put before the GEMM: such a layer is refused by name.
"""

import enum
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Module

from hybrid_train.anatomy.product_formats import Linear
from hybrid_train.model.linears import linear_modules
from hybrid_train.ops.experts import grouped_linear
from hybrid_train.ops.linear import linear
from hybrid_train.precision.emulated import Emulation, quantized_grouped_linear, quantized_linear
from hybrid_train.precision.native_audit import is_native
from hybrid_train.schema.problems import UserError


class Stage(enum.IntEnum):
    """When an edit acts."""

    permute = 0
    mask = 1
    quantize = 2
    freeze = 3


class Edit(Protocol):
    """Changes the chunks of a model; every process makes the same calls."""

    @property
    def stage(self) -> Stage:
        """When it acts."""

    def apply(self, chunks: Sequence[Module]) -> None:
        """Change the chunks of this process, as they were built, before they are wrapped."""


class OperandTransform:
    """Changes neither operand of a linear layer; an edit overrides what it changes."""

    stage = Stage.mask

    def input(self, x: Tensor) -> Tensor:
        """Return the input of the GEMM, [..., I]: gathered, as the weight of this rank meets it."""
        return x

    def weight(self, weight: Tensor, expert: int) -> Tensor:
        """Return a weight of the GEMM, [O, I]: this rank's part.

        Args:
            weight: as the transforms before leave it.
            expert: number among the local experts; 0 in a layer without any.
        """
        return weight


class EditedLinear:
    """The transforms and the GEMM of one linear layer.

    Attributes:
        transforms: in the order of their stages, those of one stage as they were added.
        emulations: how the GEMM is quantized, one for each local expert, one in a layer without
            experts; empty: it is not.
    """

    def __init__(self) -> None:
        self.transforms: list[OperandTransform] = []
        self.emulations: Sequence[Emulation] = ()

    def multiply(self, x: Tensor, weight: Tensor, gradient_buffer: Tensor | None = None) -> Tensor:
        """Multiply x [..., I] by weight [O, I]; -> [..., O].

        Args:
            x: inputs.
            weight: the parameter.
            gradient_buffer: as in `ops.linear.linear`; not used where the weight is transformed,
                since its gradient must pass through the transforms first.
        """
        x, changed = self._input(x), self._weight(weight, 0)
        buffer = _fused(weight, gradient_buffer) if changed is weight else None
        if self.emulations:
            return quantized_linear(x, changed, self.emulations[0], buffer)
        return linear(x, changed, buffer)

    def multiply_grouped(
        self, x: Tensor, weights: Sequence[Tensor], counts: Sequence[int]
    ) -> Tensor:
        """Multiply each token by the matrix of its expert; as `ops.experts.grouped_linear`."""
        x = self._input(x)
        weights = [self._weight(weight, expert) for expert, weight in enumerate(weights)]
        if self.emulations:
            return quantized_grouped_linear(x, weights, counts, self.emulations)
        return grouped_linear(x, weights, counts)

    def _input(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform.input(x)
        return x

    def _weight(self, weight: Tensor, expert: int) -> Tensor:
        for transform in self.transforms:
            weight = transform.weight(weight, expert)
        return weight


def apply_edits(edits: Iterable[Edit], chunks: Sequence[Module]) -> None:
    """Let edits change a model, in the order of their stages, whatever order they come in."""
    for edit in sorted(edits, key=lambda edit: edit.stage):
        edit.apply(chunks)


def linears_of(chunks: Iterable[Module]) -> Iterator[tuple[Linear, Module]]:
    """Yield the linear layers of several chunks."""
    for chunk in chunks:
        yield from linear_modules(chunk)


def add_transform(linear: Linear, module: Module, transform: OperandTransform) -> None:
    """Put a transform before the GEMM of a linear layer, behind those of earlier stages.

    Raises:
        UserError: if the layer is one of Transformer Engine.
    """
    if is_native(module):
        raise UserError(
            f"{linear.module} of layer {linear.layer} is a linear of Transformer Engine, whose "
            "operands no edit can change: set runtime.kernels=plain (precision.backend=emulated "
            "where products are quantized)"
        )
    edited = edits_of(module) or EditedLinear()
    edited.transforms = sorted([*edited.transforms, transform], key=lambda one: one.stage)
    _install(module, edited)


def quantize(module: Module, emulations: Sequence[Emulation]) -> None:
    """Let the GEMM of a linear layer multiply quantized operands; none: undo that."""
    edited = edits_of(module) or EditedLinear()
    edited.emulations = emulations
    _install(module, edited)


def edits_of(module: Module) -> EditedLinear | None:
    """Return what edits make of a linear layer; None where it is as it was built."""
    found: EditedLinear | None = getattr(module, "edited", None)
    return found


def emulations_of(module: Module) -> list[Emulation]:
    """Return how a linear layer is emulated, experts one by one; nothing where it is not."""
    edited = edits_of(module)
    return [] if edited is None else list(edited.emulations)


def _install(module: Module, edited: EditedLinear) -> None:
    """Let a layer multiply by way of its edits; without any it is as it was built."""
    idle = not edited.transforms and not edited.emulations
    module.edited = None if idle else edited  # type: ignore[assignment]
    if not hasattr(type(module), "_forward_impl"):
        return  # a layer of ours, which looks for its edits itself
    if idle:
        vars(module).pop("_forward_impl", None)  # the method of core's class shows again
    else:
        module._forward_impl = partial(_split_linear, edited)  # type: ignore[assignment]


def _fused(weight: Tensor, buffer: Tensor | None) -> Tensor | None:
    """Tell Megatron's data parallelism that the gradient is in its buffer already."""
    if buffer is not None:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return buffer


def _split_linear(  # noqa: PLR0913 - the arguments of core's
    edited: EditedLinear,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_: Any,
) -> Tensor:
    """Stand for core's linear function (layers.py 755): gather, multiply, reduce on the way back.

    A gathered tensor is quantized as a whole, as Transformer Engine does.
    """
    assert bias is None, "the family has no linear bias"
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(
            input, tensor_parallel_output_grad=True, group=tp_group
        )
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    buffer = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
    return edited.multiply(input, weight, buffer)
