"""The roots of jobs that look at the data of a run."""

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING

from hybrid_train.config.problems import Problem, at_least
from hybrid_train.config.schema.train import TrainJob


@dataclass(kw_only=True)
class ShowJob:
    """The rows of one step of a run: their sources, documents and texts."""

    run_dir: str = MISSING
    step: int = MISSING  # the first is 1
    rows: int = 8  # of the step, at most
    characters: int = 300  # of the text of a row, at most

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(1, step=self.step, rows=self.rows)
        yield from at_least(0, characters=self.characters)


@dataclass(kw_only=True)
class IndexJob(TrainJob):
    """A training run whose indices of the data are built ahead."""
