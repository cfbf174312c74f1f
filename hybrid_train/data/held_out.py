"""The rows of a validation: those of each source after those of the one before, the same always."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrid_train.data.mixture import Fields, Rows
from hybrid_train.data.plan import Opened, open_rows, weights_of
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob

# Validation has the same order in every run, so that runs with other seeds can be compared.
_SEED = 0


@dataclass(frozen=True)
class Set:
    """What a validation reads of one source."""

    source: int  # its number in a batch
    rows: Rows
    used: int
    wanted: int


class HeldOut:
    """Rows of several sets, numbered through."""

    def __init__(self, sets: Sequence[Set]) -> None:
        self.sets = sets
        self._firsts = np.cumsum([0, *(one.used for one in sets)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def fill(self, row: int) -> Fields:
        """Return the fields of a row; see `Mixture.fill`."""
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        fields = self.sets[number].rows.fill(row - int(self._firsts[number]))
        return {**fields, "source": np.asarray(self.sets[number].source)}


def hold_out(job: TrainJob, opened: Opened, names: Sequence[str]) -> HeldOut:
    """Open the validation of a phase.

    Args:
        job: the run as it is in the phase.
        opened: the sources of the validation split.
        names: of all sources of the run, in the order of their numbers.

    Raises:
        UserError: if a source is too short for a row.
    """
    weights = weights_of(job.data.validation_blend, opened)
    total = job.train.validation_batches * job.train.global_batch
    sets = []
    for name, weight in weights.items():
        if not weight:
            continue
        rows = open_rows(name, job, opened, seed=_SEED)
        there = rows.first_epoch()
        if there < 1:
            raise UserError(
                f"the validation part of {opened.documents[name].name} holds "
                f"{opened.documents[name].tokens} tokens, too few for one sequence of "
                f"{job.train.sequence_length} and its last label; shorten train.sequence_length "
                "or leave it out"
            )
        wanted = max(1, round(total * weight / sum(weights.values())))
        sets.append(Set(names.index(name), rows, min(there, wanted), wanted))
    return HeldOut(sets)
