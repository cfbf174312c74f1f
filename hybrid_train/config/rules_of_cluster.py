"""Rules about a run and its cluster, and the numbers of nodes that a run can take.

`submit` and `check cluster=NAME` hold a run against them.
"""

import enum
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hybrid_train.config import cards
from hybrid_train.config.rules_of_data import SHARE_RULES
from hybrid_train.config.rules_of_hardware import card_of
from hybrid_train.planning import degrees
from hybrid_train.planning.phases import views_of
from hybrid_train.planning.stages import most_kept
from hybrid_train.schema.cluster import Cluster, processes_per_node
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.hardware import Card
from hybrid_train.schema.job_roots import CheckJob, SubmitJob
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Device
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted, show_bytes

_TIGHT = 0.8  # of a GPU: what is left is soon taken by activations, buffers of CUDA and NCCL
# The path stands in lines of sbatch, which quotes nothing, and takes % and \ for its own.
_PLAIN_PATH = re.compile(r"[\w./+=@~-]+")


def cluster_fits_the_run(job: TrainJob, processes: int) -> Iterator[Problem]:
    """The nodes have what the run asks for, and SLURM can write its log into the run folder."""
    cluster = _cluster_of(job)
    if cluster is None:
        return
    device, gpus = job.runtime.device, cluster.gpus_per_node
    if device is Device.cuda and not gpus:
        yield Problem("runtime.device", "cuda", "needs cluster.gpus_per_node > 0", "cpu")
    if device is Device.cpu and gpus:
        rule = f"leaves {counted(gpus, 'GPU')} of every node idle; take another cluster=..."
        yield Problem("runtime.device", "cpu", rule, "auto")
    if isinstance(job, CheckJob):
        yield from _processes_fill_the_nodes(job, cluster, processes)
    else:
        yield from _can_be_submitted(job, cluster)


def _cluster_of(job: TrainJob) -> Cluster | None:
    return job.cluster if isinstance(job, SubmitJob | CheckJob) else None


def _processes_fill_the_nodes(job: CheckJob, cluster: Cluster, processes: int) -> Iterator[Problem]:
    """A number of processes that is named takes whole nodes, and as many as the cluster has."""
    if job.processes is None:
        return
    own = processes_per_node(cluster)
    if cluster.nodes is not None and processes != cluster.nodes * own:
        whole = cluster.nodes * own
        rule = f"must be {whole:,}: cluster.nodes ({cluster.nodes:,}) x {own} on each"
        yield Problem("processes", processes, rule, whole)
    elif processes % own and processes > own:
        rule = f"must be a multiple of {own}, the processes of a node"
        yield Problem("processes", processes, rule, -(-processes // own) * own, unit=own)


def _can_be_submitted(job: TrainJob, cluster: Cluster) -> Iterator[Problem]:
    path = str(Path(job.run_dir).absolute())
    if job.run_dir and not _PLAIN_PATH.fullmatch(path):
        rule = f"SLURM takes letters, digits and ./+=@~_- in a path; this one is {path}"
        yield Problem("run_dir", job.run_dir, rule)
    image = cluster.container.image
    if image is not None and image.startswith(("/", ".")) and not Path(image).is_file():
        yield Problem("cluster.container.image", image, "there is no such file")


def kept_fits_the_gpus(job: TrainJob, processes: int) -> Iterator[Problem]:
    """What a process keeps from step to step fits into a GPU, in every phase.

    It is looked at where all else is sound, once: it takes too long for a rule of the table.
    """
    cluster, rows = _cluster_of(job), vocab_rows(job)
    card = None if cluster is None else card_of(job)
    if cluster is None or card is None or not rows:
        return
    most = max(most_kept(phase, processes, rows) for phase in views_of(job))
    if room_for(most, card) is Room.no:
        rule = (
            f"has {show_bytes(card.memory_gb * 1e9)}, and a process keeps {show_bytes(most)} from "
            "step to step, activations not counted; split it further (parallel.tensor, pipeline, "
            "expert, fsdp), take more processes, or another card"
        )
        yield Problem(cards.SETTING, cluster.hardware, rule)


class Room(enum.Enum):
    """Whether what a process keeps from step to step fits into a GPU."""

    fits = "fits"
    tight = "tight"  # in more than `_TIGHT` of the memory
    no = "no"


def room_for(kept: int, card: Card) -> Room:
    """Compare the bytes that a process keeps with the memory of a card."""
    whole = card.memory_gb * 1e9
    if kept > whole:
        return Room.no
    return Room.tight if kept > _TIGHT * whole else Room.fits


def vocab_rows(job: TrainJob) -> int | None:
    """Return the rows of the embedding as they are stored; None where a tokenizer says it."""
    size = job.model.vocab_size
    if size is None and isinstance(job.data, Quickstart):
        size = job.data.vocab_size
    return None if size is None else degrees.padded_vocab_size(size, job.model.vocab_multiple)


def asked_nodes(job: TrainJob, cluster: Cluster) -> int:
    """Return the number of nodes asked for: the fewest possible where the user names none."""
    return cluster.nodes or node_unit(job, cluster)


def asked_processes(job: TrainJob, cluster: Cluster) -> int:
    """Return the number of processes on all nodes asked for."""
    return asked_nodes(job, cluster) * processes_per_node(cluster)


def nodes_of(job: CheckJob, processes: int) -> int:
    """Return the number of nodes that a checked run takes on its cluster."""
    assert job.cluster is not None
    if job.processes is None:
        return asked_nodes(job, job.cluster)
    return -(-processes // processes_per_node(job.cluster))


def node_unit(job: TrainJob, cluster: Cluster) -> int:
    """Return the number of nodes whose multiples the degrees of all phases can split."""
    of_phases = [degrees.processes_unit(phase.parallel) for phase in views_of(job)]
    own = processes_per_node(cluster)
    return math.lcm(*of_phases, own) // own


def legal_nodes(job: SubmitJob) -> list[int]:
    """Return the node counts from `min_nodes` to `nodes` on which all phases can run, ascending.

    Args:
        job: a job that passes the checks on all its nodes; other rules ask for no number.
    """
    whole = asked_nodes(job, job.cluster)
    return _legal_within(job, job.cluster.min_nodes or whole, whole)


def most_nodes(jobs: Sequence[SubmitJob], available: int) -> int | None:
    """Return the largest number of nodes, of those available, on which each job can run."""
    legal = [set(_legal_within(job, 1, available)) for job in jobs]
    return max(set.intersection(*legal), default=None) if legal else None


def _legal_within(job: SubmitJob, fewest: int, largest: int) -> list[int]:
    own, step = processes_per_node(job.cluster), node_unit(job, job.cluster)
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
