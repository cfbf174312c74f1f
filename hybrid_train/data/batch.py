"""Batch: what travels from the loader to the model.

Dimensions: B sequences of a microbatch, L sequence length in tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from hybrid_train.ops.context import own_pieces


@dataclass(frozen=True)
class Batch:
    """One microbatch of one data-parallel rank.

    Attributes:
        tokens: inputs, [B, L], int64.
        labels: the token that follows each input, [B, L], int64.
        loss_weights: what each label counts in the loss, 0 where it does not, [B, L], float32.
        position_ids: places within the row or within the document, from 0, [B, L], int64.
        sequence_index: number of the document within its row, from 0, non-decreasing, [B, L],
            int32. Padding at the end of a row is one more, with weights of 0. None: the row is
            one sequence, whatever is in it. It is of the whole row on every context-parallel rank,
            since Mamba's states and the keys of attention are.
        source: number of the source of each row, [B], int64. None: there is one source only.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    sequence_index: Tensor | None = None
    source: Tensor | None = None

    @property
    def padding(self) -> Tensor | None:
        """Where a packed row holds nothing, [B, L], bool; None if rows are not packed."""
        return None if self.sequence_index is None else self.loss_weights == 0

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on `device`."""
        return self._map(lambda field: field.to(device, non_blocking=True))

    def part_of(self, rank: int, size: int) -> "Batch":
        """Return what one of `size` context-parallel ranks holds of each sequence, [B, L / size].

        The sequence index and the source stay whole.

        Raises:
            ValueError: if the sequences do not split; see `ops.context`.
        """
        whole = replace(self, sequence_index=None, source=None)
        parts = whole._map(lambda field: own_pieces(field, rank, size, dim=1))
        return replace(parts, sequence_index=self.sequence_index, source=self.source)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: change(t) for name, t in given.items() if t is not None})
