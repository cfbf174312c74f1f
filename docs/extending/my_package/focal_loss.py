"""The focal loss of the next token.

Dimensions: B batch, S sequence, N tokens of a chunk, V/tp this rank's part of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from hybrid_train.data.batch import Batch
from hybrid_train.megatron.hybrid import Outputs
from hybrid_train.ops.logits import CrossEntropy, HeadPart, Pullback
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError
from hybrid_train.training.objective import Given, LossFunction, Objective
from my_package.focal import Focal


@dataclass(frozen=True)
class FocalTerm:
    """(1 - p)^gamma times the cross-entropy, where p is the probability of the label.

    Source: Lin et al., arXiv:1708.02002, eq. 4.
    """

    labels: Tensor
    gamma: float

    def __call__(self, logits: Tensor, rows: slice, head: HeadPart) -> tuple[Tensor, Pullback]:
        """Return the values of a chunk of logits [N, V/tp], and the gradient of their sum."""
        cross_entropy, pullback = CrossEntropy(self.labels)(logits, rows, head)
        p = torch.exp(-cross_entropy)
        doubt = (1 - p).clamp(min=1e-12)
        factor = doubt**self.gamma
        # By the chain rule: of the cross-entropy itself, and of its factor.
        slope = factor + self.gamma * doubt ** (self.gamma - 1) * p * cross_entropy
        return factor * cross_entropy, lambda weights: pullback(weights * slope)


class FocalLoss(Objective):
    """Mean focal loss over the labels that count."""

    names = ("loss",)

    def __init__(self, settings: Focal, given: Given) -> None:
        if parse(given.model.pattern).mtp_depths:
            raise UserError(
                "the focal loss trains no MTP: take the part after / out of the pattern"
            )
        self._gamma = settings.gamma

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Sum the weights of the labels, [1]."""
        return torch.stack([batch.loss_weights.sum() for batch in batches]).sum().reshape(1)

    def forward(self, model: Module, batch: Batch, totals: Tensor) -> tuple[Tensor, LossFunction]:
        """Run the model on one microbatch."""
        output = model(
            batch.tokens,
            sequence_index=batch.sequence_index,
            padding=batch.padding,
            read=lambda outputs: self._read(outputs, batch),
        )
        return output, _report

    def _read(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the weighted sum, and the weighted values [B, S]."""
        term = FocalTerm(batch.labels.t().flatten(), self._gamma)
        total, values = outputs.head.weighted_sum(outputs.hidden, term, batch.loss_weights)
        return total, values * batch.loss_weights


def _report(output: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    total, weighed = output  # as read
    count = torch.tensor(weighed.numel(), dtype=torch.int, device=weighed.device)
    return total, count, {"sums": weighed.sum().reshape(1), "rows": weighed.sum(dim=1)}
