"""Which rows a data-parallel rank reads at each step; the position is one integer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from hybrid_train.data.batch import Batch, Row, stack
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted


class BatchSource(Protocol):
    """Endless microbatches of one data-parallel rank; `Loader` reads them, others make them up.

    A step takes its microbatches and then looks at nothing of it until it is over: only between
    steps is a state asked for.
    """

    @property
    def global_batch(self) -> int:
        """Sequences that all ranks take in the next step."""

    def __iter__(self) -> Iterator[Batch]:
        """Return itself."""

    def __next__(self) -> Batch:
        """Return the next microbatch of this rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept for the next step to be the same after a resume.

        Plain data that JSON can hold, the same on every rank and for every number of ranks. Empty:
        all follows from config, data and the position in tokens.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was kept.

        Raises:
            UserError: if it is that of another kind of source.
        """


class Loader:
    """Endless microbatches of one rank.

    A step that starts at position c uses rows [c, c + G) of the phase, where G is
    `global_batch(c)`. Microbatch m of rank r takes the rows
    c + (m*data_size + r)*microbatch + [0, microbatch). So the global batch of a step is the same
    for every number of ranks and every size of microbatch, and the whole state is
    `consumed_sequences`: the rows of the steps that are done. `read` gives a row by its number.

    Raises:
        ValueError: if a global batch does not split evenly.
    """

    def __init__(
        self,
        read: Callable[[int], Row],
        *,
        microbatch: int,
        global_batch: Callable[[int], int],
        data_rank: int = 0,
        data_size: int = 1,
        consumed_sequences: int = 0,
    ) -> None:
        self._read = read
        self._microbatch = microbatch
        self._batch_at = global_batch
        self._data_rank = data_rank
        self._data_size = data_size
        self._done_in_step = 0  # microbatches of this step that were handed out
        self.consumed_sequences = consumed_sequences
        self._require_even_split()

    @property
    def global_batch(self) -> int:
        """Sequences that all ranks read in the step at the present position."""
        return self._batch_at(self.consumed_sequences)

    @property
    def microbatches_per_step(self) -> int:
        """Microbatches that this rank reads in the step at the present position."""
        return self.global_batch // (self._microbatch * self._data_size)

    def _require_even_split(self) -> None:
        if self.global_batch % (self._microbatch * self._data_size):
            raise ValueError(
                f"a global batch of {counted(self.global_batch, 'sequence')} does not split into "
                f"microbatches of {self._microbatch} on "
                f"{counted(self._data_size, 'data-parallel rank')}; it must be a "
                f"multiple of {self._microbatch * self._data_size}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position in tokens says which rows are next."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            kept = ", ".join(sorted(state))
            raise UserError(
                f"the checkpoint keeps the state of another source of batches ({kept}), and this "
                "run reads token files; go on with that source, or take the weights alone: "
                "checkpoint.load_only=weights"
            )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._done_in_step == 0:
            self._require_even_split()
        column = self._done_in_step * self._data_size + self._data_rank
        first = self.consumed_sequences + column * self._microbatch
        batch = stack([self._read(first + i) for i in range(self._microbatch)])
        self._done_in_step += 1
        if self._done_in_step == self.microbatches_per_step:
            self._done_in_step = 0
            self.consumed_sequences += self.global_batch
        return batch


class Validation:
    """The same rows at every validation; iterate it once for each.

    Every rank gets the same number of microbatches, `len(validation)`. Where the rows do not fill
    the last ones, rows whose labels weigh nothing do, so that the same tokens count for every
    number of ranks and every size of microbatch.
    """

    def __init__(
        self,
        read: Callable[[int], Row],
        *,
        num_sequences: int,
        microbatch: int,
        data_rank: int = 0,
        data_size: int = 1,
    ) -> None:
        self._read = read
        self.num_sequences = num_sequences
        self._microbatch = microbatch
        self._data_rank = data_rank
        self._data_size = data_size

    def __len__(self) -> int:
        return -(-self.num_sequences // (self._microbatch * self._data_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self._data_size + self._data_rank) * self._microbatch
            yield stack([self._row(first + i) for i in range(self._microbatch)])

    def _row(self, index: int) -> Row:
        if index < self.num_sequences:
            return self._read(index)
        return self._read(0).without_labels()
