"""Batch: what travels from the loader to the model.

Dimensions: B sequences of a microbatch, L sequence length in tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from hybrid_train.ops.context import own_pieces

_WHOLE = ("sequence_index", "source", "row_extras")  # on every context-parallel rank


@dataclass(frozen=True)
class Batch:
    """One microbatch of one data-parallel rank.

    Attributes:
        tokens: inputs, [B, L], int64.
        labels: the token that follows each input, [B, L], int64.
        loss_weights: what each label counts in the loss, 0 where it does not, [B, L], float32.
        position_ids: places within the row or within the document, from 0, [B, L], int64.
        padding: true where a packed row holds nothing, which routers do not count, [B, L], bool. A
            token whose label has a weight of 0 is no padding: a prompt is read like any other text.
            None: there is none.
        sequence_index: number of the document within its row, from 0, non-decreasing, [B, L],
            int32. Padding at the end of a row is one more, with weights of 0. None: the row is
            one sequence, whatever is in it. It is of the whole row on every context-parallel rank,
            since Mamba's states and the keys of attention are.
        source: number of the source of each row, [B], int64. None: there is one source only.
        token_extras: further fields by name, of each token: [B, L, ...]; context-parallel ranks
            hold their parts, as of tokens.
        row_extras: further fields by name, of each row: [B, ...]; whole on every context-parallel
            rank, whatever stands behind B.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    padding: Tensor | None = None
    sequence_index: Tensor | None = None
    source: Tensor | None = None
    token_extras: Mapping[str, Tensor] = field(default_factory=dict)
    row_extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse padding that the model would not hear of.

        Raises:
            ValueError: if there is padding, but no sequence index that tells it from the documents.
        """
        if self.padding is not None and self.sequence_index is None:
            raise ValueError(
                "a batch with padding needs a sequence_index, in which padding is a document of "
                "its own"
            )

    def without_labels(self) -> "Batch":
        """Return the same batch with nothing in it that counts: no label, no token of a router."""
        padding = None if self.padding is None else torch.ones_like(self.padding)
        return replace(self, loss_weights=torch.zeros_like(self.loss_weights), padding=padding)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on `device`."""
        return self._map(lambda _, values: values.to(device, non_blocking=True))

    def part_of(self, rank: int, size: int) -> "Batch":
        """Return what one of `size` context-parallel ranks holds of each sequence, [B, L / size].

        The sequence index, the source and the extra fields of rows stay whole.

        Raises:
            ValueError: if the sequences do not split; see `ops.context`.
        """

        def cut(name: str, values: Tensor) -> Tensor:
            return values if name in _WHOLE else own_pieces(values, rank, size, dim=1)

        return self._map(cut)

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> "Batch":
        def changed(name: str, value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: change(name, one) for key, one in value.items()}
            return None if value is None else change(name, value)

        names = (one.name for one in fields(self))
        return Batch(**{name: changed(name, getattr(self, name)) for name in names})
