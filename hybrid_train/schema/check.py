"""The root of a check: a training run, how many processes it will have, and on which cluster."""

from dataclasses import dataclass

from hybrid_train.schema.cluster import Cluster
from hybrid_train.schema.limits import Processes
from hybrid_train.schema.train import TrainJob


@dataclass(kw_only=True)
class CheckJob(TrainJob):
    """A training run that is looked at before it starts."""

    processes: Processes | None = None  # on all machines; None: those of the cluster's nodes, or 1
    cluster: Cluster | None = None  # what the run is held against; None: nothing
    json: bool = False  # print one JSON object instead of tables; also: --json
