"""Linear layers whose operands are changed or quantized, with sums in float32, on any machine.

    y = gemm(input_n(... input_1(x)), weight_n(... weight_1(W)))

The transforms of edits act in the order of their stages, and the GEMM comes last; autograd passes
through all of it. Each of the three GEMMs takes the operands that its recipe says, so the gradient
is that of the recipe and not of an ideal linear layer. What hardware does inside a GEMM (the order
of sums, the width of its accumulators) is not emulated.

Dimensions: T tokens (any leading axes), I input width, O output width.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_train.anatomy.gemm_formats import Formats, Linear
from hybrid_train.ops.experts import grouped_linear
from hybrid_train.ops.linear import add_gemm, linear
from hybrid_train.ops.linear import gemm as linear_gemm
from hybrid_train.precision.audit import Records, type_in_words
from hybrid_train.precision.fp8_weights import Float8Weight
from hybrid_train.precision.operands import quantize_dequantize
from hybrid_train.precision.quantize import AmaxHistory
from hybrid_train.precision.recipes import (
    OPERANDS,
    Operand,
    Scheme,
    Shape,
    schemes,
)
from hybrid_train.schema.precision import Gemm, GemmFormat, Precision


@dataclass(frozen=True)
class Emulation:
    """How the GEMMs of one matrix are quantized.

    Attributes:
        linear: whose GEMMs they are.
        records: of its network: where its GEMMs are noted, and the noise that rounds them.
        schemes: of both operands of each GEMM; None: as they come.
        histories: of the largest values of each operand, for fp8_delayed.
        rows_vary: whether the number of tokens changes from step to step, as that of experts does:
            then no GEMM is called that is compiled for its sizes.
    """

    linear: Linear
    records: Records
    schemes: dict[Gemm, tuple[Scheme, Scheme] | None]
    histories: dict[Operand, AmaxHistory] = field(default_factory=dict)
    rows_vary: bool = False

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply x [T, I] by weight [O, I]."""
        return x @ weight.t() if self.rows_vary else linear_gemm(x, weight)

    def scheme(self, gemm: Gemm, operand: Operand) -> Scheme | None:
        """Return how an operand is quantized for a GEMM."""
        found = self.schemes[gemm]
        if found is None:
            return None
        return found[[one for one, _ in OPERANDS[gemm]].index(operand)]

    def agree(self, operand: Operand, one: Gemm, other: Gemm) -> bool:
        """Tell whether an operand has the same values in two GEMMs."""
        scheme = self.scheme(one, operand)
        if scheme != self.scheme(other, operand):
            return False
        return scheme is None or (scheme.shape is not Shape.vector and not scheme.stochastic)


def emulation_of(
    linear: Linear,
    formats: Formats,
    precision: Precision,
    records: Records,
    *,
    rows_vary: bool = False,
) -> Emulation:
    """Return how a linear layer of these formats is emulated; histories start empty."""
    histories = {}
    if GemmFormat.fp8_delayed in formats.formats.values():
        for operand in Operand:
            histories[operand] = AmaxHistory(precision.amax_history, precision.amax_choice)
    found = {gemm: schemes(format, gemm, precision) for gemm, format in formats.formats.items()}
    return Emulation(linear, records, found, histories, rows_vary)


def quantized_linear(
    x: Tensor, weight: Tensor, emulation: Emulation, gradient_buffer: Tensor | None = None
) -> Tensor:
    """Multiply x [..., I] by weight [O, I]; -> [..., O] in the type of x.

    Args:
        x: inputs.
        weight: matrix, one row per output.
        emulation: how operands are quantized.
        gradient_buffer: as in `ops.linear.linear`.
    """
    y: Tensor = _Quantized.apply(x, weight, emulation, gradient_buffer)
    return y


def quantized_grouped_linear(
    x: Tensor, weights: Sequence[Tensor], counts: Sequence[int], emulations: Sequence[Emulation]
) -> Tensor:
    """Multiply each token by the matrix of its expert, each expert quantized by itself.

    Args:
        x: tokens sorted by expert, [T, I].
        weights: one matrix [O, I] per expert.
        counts: tokens of each expert; the sum is T, zeros are legal.
        emulations: one per expert.

    Returns:
        [T, O].
    """
    parts = zip(x.split(list(counts)), weights, emulations, strict=True)
    return torch.cat([quantized_linear(rows, weight, how) for rows, weight, how in parts])


class _Quantized(torch.autograd.Function):
    """Keeps the quantized operand where a later GEMM takes the same values, else the raw one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, how: Emulation, gradient_buffer: Tensor | None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        left = _taken(rows, Operand.input, Gemm.fprop, how)
        right = _taken(weight, Operand.weight, Gemm.fprop, how)
        ctx.kept_input = how.agree(Operand.input, Gemm.fprop, Gemm.wgrad)
        ctx.kept_weight = how.agree(Operand.weight, Gemm.fprop, Gemm.dgrad)
        ctx.save_for_backward(
            left if ctx.kept_input else rows, right if ctx.kept_weight else weight
        )
        ctx.how, ctx.gradient_buffer, ctx.shape = how, gradient_buffer, x.shape
        ctx.types = (x.dtype, weight.dtype)
        _note(how, Gemm.fprop, left, right)
        return how.multiply(left, right).to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        how: Emulation = ctx.how
        grad = grad.reshape(-1, grad.shape[-1])
        left, grad_x, grad_weight = None, None, None
        if ctx.needs_input_grad[0]:
            left = _taken(grad, Operand.gradient, Gemm.dgrad, how)
            if not ctx.kept_weight:
                weight = _taken(weight, Operand.weight, Gemm.dgrad, how)
            _note(how, Gemm.dgrad, left, weight)
            grad_x = how.multiply(left, weight.t()).to(ctx.types[0]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            if left is None or not how.agree(Operand.gradient, Gemm.dgrad, Gemm.wgrad):
                left = _taken(grad, Operand.gradient, Gemm.wgrad, how)
            if not ctx.kept_input:
                rows = _taken(rows, Operand.input, Gemm.wgrad, how)
            _note(how, Gemm.wgrad, left, rows)
            grad_weight = _weight_gradient(left, rows, ctx.types[1], ctx.gradient_buffer)
        return grad_x, grad_weight, None, None


def _taken(tensor: Tensor, operand: Operand, gemm: Gemm, how: Emulation) -> Tensor:
    """Return the values of an operand as a GEMM multiplies them."""
    scheme = how.scheme(gemm, operand)
    if scheme is None:
        return tensor
    if isinstance(tensor, Float8Weight):
        assert tensor.scheme == scheme, f"kept as {tensor.scheme}, taken as {scheme}"
        return tensor.dequantize()
    history = how.histories.get(operand)
    return quantize_dequantize(
        tensor,
        scheme,
        dict(OPERANDS[gemm])[operand],
        scale=None if history is None else history.scale(tensor, scheme.element),
        noise=how.records.noise.draw(tensor) if scheme.stochastic else None,
        statistics=how.records.statistics.of(how.linear, gemm, operand),
    )


def _weight_gradient(
    grad: Tensor, rows: Tensor, kind: torch.dtype, buffer: Tensor | None
) -> Tensor:
    if buffer is None:
        return (grad.t() @ rows).to(kind)
    add_gemm(buffer, grad, rows)
    return torch.empty(buffer.shape, dtype=kind, device=buffer.device)


def _note(how: Emulation, gemm: Gemm, left: Tensor, right: Tensor) -> None:
    """Tell the audit what is about to be multiplied."""
    audit = how.records.audit
    if not audit.listening:
        return
    (one, _), (other, _) = OPERANDS[gemm]
    words = [
        str(how.scheme(gemm, operand) or type_in_words(tensor.dtype))
        for operand, tensor in ((one, left), (other, right))
    ]
    audit.note(how.linear, gemm, *words)


class Stage(enum.IntEnum):
    """When an edit acts."""

    permute = 0
    mask = 1
    quantize = 2
    freeze = 3


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


def _fused(weight: Tensor, buffer: Tensor | None) -> Tensor | None:
    """Tell Megatron's data parallelism that the gradient is in its buffer already."""
    if buffer is not None:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return buffer
