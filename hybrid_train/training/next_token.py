"""Cross-entropy of the next token, with the losses of the MTP depths.

Dimensions: B batch, S sequence, D prediction depths.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from hybrid_train.data.batch import Batch
from hybrid_train.megatron.hybrid import Outputs
from hybrid_train.megatron.mamba import shift
from hybrid_train.ops.context import continues
from hybrid_train.ops.logits import CrossEntropy
from hybrid_train.schema import objective as schema
from hybrid_train.schema.pattern import parse
from hybrid_train.tracking import metrics
from hybrid_train.training.objective import Given, LossFunction, Objective


class Depths:
    """What the main head and each MTP depth are told of a batch: depth k looks k tokens further.

    Depth k predicts one token further than depth k - 1, so it has fewer valid tokens; each depth is
    divided by its own count over all ranks and microbatches of the step.

    Attributes:
        number: D, depths behind the main head.
        loss_scale: of the mean of their losses.
    """

    def __init__(self, given: Given, loss_scale: float) -> None:
        self.number = parse(given.model.pattern).mtp_depths
        self.loss_scale = loss_scale
        self._context_group = given.groups.cp

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms of the depths."""
        return tuple(metrics.mtp_loss(depth + 1) for depth in range(self.number))

    def __call__(self, values: Tensor, batch: Batch) -> list[Tensor]:
        """Return what each depth sees of values [B, S], from its places on: one more for each."""
        group, continued = self._context_group, None
        if batch.sequence_index is not None:
            continued = continues(batch.sequence_index, group.rank(), group.size())
        found = [values]
        for _ in range(self.number):
            found.append(shift(found[-1], group, continued))
        return found

    def masks(self, batch: Batch) -> Tensor:
        """Return where the label of each depth counts, [1 + D, B, S]."""
        return torch.stack(self(batch.loss_weights, batch))

    def factors(self, totals: Tensor) -> Tensor:
        """Return what brings each sum to the main count, which divides all, [1 + D].

        Args:
            totals: of the masks over all ranks, [1 + D].
        """
        scale = self.loss_scale / self.number if self.number else 0.0
        factors = scale * totals[0] / torch.where(totals > 0, totals, 1.0)
        factors[0] = 1.0
        return factors


class NextToken(Objective):
    """Mean cross-entropy plus `mtp_loss_scale` times the mean over depths of the MTP losses.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.2, eq. 24 and 25.
    """

    def __init__(self, settings: schema.NextToken, given: Given) -> None:
        self._depths = Depths(given, settings.mtp_loss_scale)
        self.names = ("loss", *self._depths.names)

    def count(self, batches: Sequence[Batch]) -> Tensor:
        return torch.stack([self._depths.masks(one).sum(dim=(1, 2)) for one in batches]).sum(dim=0)

    def forward(self, model: Module, batch: Batch, totals: Tensor) -> tuple[Tensor, LossFunction]:
        output = model(
            batch.tokens,
            batch.position_ids,
            sequence_index=batch.sequence_index,
            padding=batch.padding,
            read=lambda outputs: self._read(outputs, batch, totals),
        )
        return output, _report

    def _read(
        self, outputs: Outputs, batch: Batch, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum up the losses so that division by the main count normalises every depth.

        Returns:
            The sum; loss of each depth at each place, and its mask, [1 + D, B, S].
        """
        factors, masks = self._depths.factors(totals), self._depths.masks(batch)
        labels = self._depths(batch.labels, batch)
        found = [
            outputs.head.weighted_sum(hidden, CrossEntropy(label.t().flatten()), factor * mask)
            for hidden, label, factor, mask in zip(
                (outputs.hidden, *outputs.mtp_hidden), labels, factors, masks, strict=True
            )
        ]
        sums, losses = zip(*found, strict=True)
        # Of one depth a view: the digits of a sum depend on the order of its terms in memory.
        stacked = losses[0].unsqueeze(0) if len(losses) == 1 else torch.stack(losses)
        return torch.stack(sums).sum(), stacked, masks


def _report(output: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    total, losses, masks = output  # as read
    weighed = losses * masks
    sums = weighed.sum(dim=(1, 2))
    return total, masks[0].sum().int(), {"sums": sums, "rows": weighed[0].sum(dim=1)}
