"""Batch: what travels from the loader to the model.

Dimensions: B sequences of a microbatch, L sequence length in tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One microbatch of one data-parallel rank.

    Attributes:
        tokens: inputs, [B, L], int64.
        labels: the token that follows each input, [B, L], int64.
        loss_mask: 1 where the label counts in the loss, else 0, [B, L], float32.
        position_ids: 0 .. L-1 in each row, [B, L], int64.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on `device`."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
        )
