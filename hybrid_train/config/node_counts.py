"""How many nodes a submitted run can take: what the plan divides into, and every smaller number."""

import math
from collections.abc import Sequence

from hybrid_train.config.check_batch import SHARE_RULES
from hybrid_train.planning import degrees
from hybrid_train.planning.phases import views_of
from hybrid_train.schema.cluster import Cluster, processes_per_node
from hybrid_train.schema.submit import SubmitJob
from hybrid_train.schema.train import TrainJob


def unit(job: TrainJob, cluster: Cluster) -> int:
    """Return the number of nodes whose multiples the degrees of all phases can split."""
    of_phases = [degrees.processes_unit(phase.parallel) for phase in views_of(job)]
    own = processes_per_node(cluster)
    return math.lcm(*of_phases, own) // own


def nodes(job: TrainJob, cluster: Cluster) -> int:
    """Return the number of nodes asked for: the fewest possible where the user names none."""
    return cluster.nodes or unit(job, cluster)


def processes(job: TrainJob, cluster: Cluster) -> int:
    """Return the number of processes on all nodes asked for."""
    return nodes(job, cluster) * processes_per_node(cluster)


def legal(job: SubmitJob) -> list[int]:
    """Return the node counts from `min_nodes` to `nodes` on which all phases can run, ascending.

    Args:
        job: a job that passes the checks on all its nodes; other rules ask for no number.
    """
    whole = nodes(job, job.cluster)
    return _legal_within(job, job.cluster.min_nodes or whole, whole)


def most(jobs: Sequence[SubmitJob], available: int) -> int | None:
    """Return the largest number of nodes, of those available, on which each job can run."""
    legal = [set(_legal_within(job, 1, available)) for job in jobs]
    return max(set.intersection(*legal), default=None) if legal else None


def _legal_within(job: SubmitJob, fewest: int, largest: int) -> list[int]:
    own, step = processes_per_node(job.cluster), unit(job, job.cluster)
    phases = list(views_of(job))
    return [
        count
        for count in range(math.ceil(fewest / step) * step, largest + 1, step)
        if not any(
            problem
            for phase in phases
            for rule in SHARE_RULES
            for problem in rule(phase, count * own)
        )
    ]
