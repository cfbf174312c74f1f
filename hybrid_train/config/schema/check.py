"""The root of a check: a training run, and how many processes it will have."""

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.config.problems import Problem, at_least
from hybrid_train.config.schema.train import TrainJob


@dataclass(kw_only=True)
class CheckJob(TrainJob):
    """A training run that is looked at before it starts."""

    processes: int = 1  # of the run, on all machines together

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(1, processes=self.processes)
