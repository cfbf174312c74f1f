"""What is minimised: the protocol between the step and every training method."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module

from hybrid_train.data.batch import Batch

# output of the model -> (weighted loss sum, valid tokens, report): Megatron's contract for losses
# that are divided by the tokens of the whole step. The report has `sums` of the terms, [terms], and
# `rows`, the sum of the first term in each row of the microbatch, [B].
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


class Objective(Protocol):
    """A loss over microbatches whose terms are normalised over the whole step."""

    names: tuple[str, ...]  # of the terms, first the one that is reported as the loss

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Count the valid tokens of each term in this rank's microbatches, [terms]."""

    def forward(self, model: Module, batch: Batch, totals: Tensor) -> tuple[Tensor, LossFunction]:
        """Run the model on one microbatch; `totals` are the counts summed over all ranks."""
