"""The root of a submission: a training run, and the cluster that it is queued on."""

from dataclasses import dataclass, field, fields

from hybrid_train.schema.cluster import Cluster
from hybrid_train.schema.train import TrainJob


@dataclass(kw_only=True)
class SubmitJob(TrainJob):
    """A training run that SLURM is to start."""

    cluster: Cluster = field(default_factory=Cluster)
    dry_run: bool = False  # print what would be submitted; data may be chosen later


def training(job: SubmitJob) -> TrainJob:
    """Return the run alone, as it is frozen into its folder."""
    return TrainJob(**{one.name: getattr(job, one.name) for one in fields(TrainJob)})
