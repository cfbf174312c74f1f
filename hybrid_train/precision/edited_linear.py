"""A linear layer whose operands are changed before the GEMM, and quantized where that is asked.

    y = gemm(input_n(... input_1(x)), weight_n(... weight_1(W)))

Transforms act in the order of their stages. The GEMM comes last. Autograd passes through all of it.
"""

import enum
from collections.abc import Sequence

from torch import Tensor

from hybrid_train.ops.experts import grouped_linear
from hybrid_train.ops.linear import linear
from hybrid_train.precision.emulated import Emulation, quantized_grouped_linear, quantized_linear


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
