"""The root of a check: a training run, and how many processes it will have."""

from dataclasses import dataclass

from hybrid_train.schema.limits import Processes
from hybrid_train.schema.train import TrainJob


@dataclass(kw_only=True)
class CheckJob(TrainJob):
    """A training run that is looked at before it starts."""

    processes: Processes = 1  # of the run, on all machines together
