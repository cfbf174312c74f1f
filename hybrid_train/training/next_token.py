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
from hybrid_train.training.objective import Given, LossFunction, Objective


class NextToken(Objective):
    """Mean cross-entropy plus `mtp_loss_scale` times the mean over depths of the MTP losses.

    Depth k predicts one token further than depth k - 1, so it has fewer valid tokens; each depth
    is divided by its own count over all ranks and microbatches of the step.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.2, eq. 24 and 25.
    """

    def __init__(self, settings: schema.NextToken, given: Given) -> None:
        depths = parse(given.model.pattern).mtp_depths
        self.names = ("loss", *(f"mtp_loss_{depth + 1}" for depth in range(depths)))
        self._scale = settings.mtp_loss_scale / depths if depths else 0.0
        self._context_group = given.groups.cp

    def count(self, batches: Sequence[Batch]) -> Tensor:
        return torch.stack([self._masks(batch).sum(dim=(1, 2)) for batch in batches]).sum(dim=0)

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
        factors = self._scale * totals[0] / torch.where(totals > 0, totals, 1.0)
        factors[0] = 1.0
        masks = self._masks(batch)
        labels = self._by_depth(batch.labels, batch)
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

    def _masks(self, batch: Batch) -> Tensor:
        """Return where the label of each depth counts, [1 + D, B, S]."""
        return torch.stack(self._by_depth(batch.loss_weights, batch))

    def _by_depth(self, values: Tensor, batch: Batch) -> list[Tensor]:
        """Return what each depth sees of values [B, S], from its places on: one more for each."""
        group, continued = self._context_group, None
        if batch.sequence_index is not None:
            continued = continues(batch.sequence_index, group.rank(), group.size())
        found = [values]
        for _ in self.names[1:]:
            found.append(shift(found[-1], group, continued))
        return found


def _report(output: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    total, losses, masks = output  # as read
    weighed = losses * masks
    sums = weighed.sum(dim=(1, 2))
    return total, masks[0].sum().int(), {"sums": sums, "rows": weighed[0].sum(dim=1)}
