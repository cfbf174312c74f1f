"""The roots of jobs that look at the data of a run."""

from dataclasses import dataclass

from omegaconf import MISSING

from hybrid_train.schema.limits import Count, CountOrNone, FileName
from hybrid_train.schema.train import TrainJob


@dataclass(kw_only=True)
class ShowJob:
    """The rows of one step of a run: their sources, documents and texts."""

    run_dir: FileName = MISSING
    step: Count = MISSING  # the first is 1
    rows: Count = 8  # of the step, at most
    characters: CountOrNone = 300  # of the text of a row, at most


@dataclass(kw_only=True)
class IndexJob(TrainJob):
    """A training run whose indices of the data are built ahead."""
