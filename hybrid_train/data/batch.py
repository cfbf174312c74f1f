"""Batch: what travels from the loader to the model.

Dimensions: B sequences of a microbatch, L sequence length in tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hybrid_train.ops.context import own_pieces


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
        return self._map(lambda field: field.to(device, non_blocking=True))

    def part_of(self, rank: int, size: int) -> "Batch":
        """Return what one of `size` context-parallel ranks holds of each sequence, [B, L / size].

        Raises:
            ValueError: if the sequences do not split; see `ops.context`.
        """
        return self._map(lambda field: own_pieces(field, rank, size, dim=1))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{field.name: change(getattr(self, field.name)) for field in fields(self)})
