"""Which sequences a data-parallel rank reads at each step; resumable from one integer."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from hybrid_train.data.batch import Batch


class Sequences(Protocol):
    """Numbered sequences; each a dict of tokens, labels, loss_mask, position_ids, all [L]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class Loader:
    """Endless microbatches of one rank until the sequences are spent.

    Step k uses sequences [k*G, (k+1)*G) of the data, where G is `global_batch`. Microbatch m of
    rank r takes the sequences k*G + (m*data_size + r)*microbatch + [0, microbatch). So the global
    batch of a step is the same for every number of ranks and every size of microbatch, and the
    whole state is `consumed_sequences`: the sequences of the steps that are done.

    Raises:
        ValueError: if the global batch does not split evenly, or the position lies inside a step.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        microbatch: int,
        global_batch: int,
        data_rank: int = 0,
        data_size: int = 1,
        consumed_sequences: int = 0,
    ) -> None:
        if global_batch % (microbatch * data_size):
            raise ValueError(
                f"a global batch of {global_batch} sequences does not split into microbatches of "
                f"{microbatch} on {data_size} data-parallel rank(s); it must be a multiple of "
                f"{microbatch * data_size}"
            )
        if consumed_sequences % global_batch:
            raise ValueError(
                f"position {consumed_sequences} is no multiple of the global batch of "
                f"{global_batch} sequences; resume with the global batch of the saved run"
            )
        self._sequences = sequences
        self._microbatch = microbatch
        self._global_batch = global_batch
        self._data_rank = data_rank
        self._data_size = data_size
        self._done_in_step = 0  # microbatches of this step that were handed out
        self.consumed_sequences = consumed_sequences

    @property
    def microbatches_per_step(self) -> int:
        """Microbatches that this rank reads in one step."""
        return self._global_batch // (self._microbatch * self._data_size)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.consumed_sequences + self._global_batch > len(self._sequences):
            raise StopIteration
        column = self._done_in_step * self._data_size + self._data_rank
        first = self.consumed_sequences + column * self._microbatch
        batch = stack([self._sequences[first + i] for i in range(self._microbatch)])
        self._done_in_step += 1
        if self._done_in_step == self.microbatches_per_step:
            self._done_in_step = 0
            self.consumed_sequences += self._global_batch
        return batch


class Validation:
    """The same sequences at every validation; iterate it once for each.

    Every rank gets the same number of microbatches, `len(validation)`. Where the sequences do not
    fill the last ones, rows with a loss mask of 0 do, so that the same tokens count for every
    number of ranks and every size of microbatch.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        num_sequences: int,
        microbatch: int,
        data_rank: int = 0,
        data_size: int = 1,
    ) -> None:
        self._sequences = sequences
        self.num_sequences = min(num_sequences, len(sequences))
        self._microbatch = microbatch
        self._data_rank = data_rank
        self._data_size = data_size

    def __len__(self) -> int:
        return -(-self.num_sequences // (self._microbatch * self._data_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self._data_size + self._data_rank) * self._microbatch
            yield stack([self._row(first + i) for i in range(self._microbatch)])

    def _row(self, index: int) -> dict[str, Tensor]:
        if index < self.num_sequences:
            return self._sequences[index]
        filler = self._sequences[0]
        return {**filler, "loss_mask": torch.zeros_like(filler["loss_mask"])}


def stack(rows: list[dict[str, Tensor]]) -> Batch:
    """Join sequences [L] into one batch [B, L]."""
    return Batch(
        tokens=torch.stack([row["tokens"] for row in rows]),
        labels=torch.stack([row["labels"] for row in rows]),
        loss_mask=torch.stack([row["loss_mask"] for row in rows]),
        position_ids=torch.stack([row["position_ids"] for row in rows]),
    )
