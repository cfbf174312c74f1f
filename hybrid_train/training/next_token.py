"""Cross-entropy of the next token, with the losses of the MTP depths.

Dimensions: B batch, S sequence, D prediction depths.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module

from hybrid_train.data.batch import Batch
from hybrid_train.model.packed import shift
from hybrid_train.ops.context import continues
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
        losses = model(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            sequence_index=batch.sequence_index,
            padding=batch.padding,
        )
        return losses, lambda output: self._weigh(output, batch, totals)

    def _weigh(
        self, losses: Tensor, batch: Batch, totals: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum losses [1 + D, B, S], so that division by the main count normalises every depth."""
        masks = self._masks(batch)
        weighed = losses * masks
        sums = weighed.sum(dim=(1, 2))
        weights = self._scale * totals[0] / torch.where(totals > 0, totals, 1.0)
        weights[0] = 1.0
        # Megatron divides what it gets in place: the report needs sums of its own.
        report = {"sums": sums.detach().clone(), "rows": weighed[0].detach().sum(dim=1)}
        return sums @ weights, masks[0].sum().int(), report

    def _masks(self, batch: Batch) -> Tensor:
        """Return where the label of each depth counts, [1 + D, B, S]."""
        group, continued = self._context_group, None
        if batch.sequence_index is not None:
            continued = continues(batch.sequence_index, group.rank(), group.size())
        masks = [batch.loss_weights]
        for _ in self.names[1:]:
            masks.append(shift(masks[-1], group, continued))
        return torch.stack(masks)
