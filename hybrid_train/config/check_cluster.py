"""Rules about a run and its cluster, for `submit` and for `check cluster=NAME`."""

import re
from collections.abc import Iterator
from pathlib import Path

from hybrid_train.config import node_counts
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.planning.phases import views_of
from hybrid_train.planning.stages import most_kept
from hybrid_train.schema.check import CheckJob
from hybrid_train.schema.cluster import Cluster, processes_per_node
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Device
from hybrid_train.schema.submit import SubmitJob
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted, show_bytes

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
    if cluster is None or not cluster.gpus_per_node or cluster.gpu_memory_gb is None or not rows:
        return
    most = max(most_kept(phase, processes, rows) for phase in views_of(job))
    if most > cluster.gpu_memory_gb * 1e9:
        rule = (
            f"a process keeps {show_bytes(most)} from step to step, activations not counted; split "
            "it further (parallel.tensor, pipeline, expert, fsdp), or take more processes"
        )
        yield Problem("cluster.gpu_memory_gb", f"{cluster.gpu_memory_gb:g}", rule)


def vocab_rows(job: TrainJob) -> int | None:
    """Return the rows of the embedding as they are stored; None where a tokenizer says it."""
    size = job.model.vocab_size
    if size is None and isinstance(job.data, Quickstart):
        size = job.data.vocab_size
    return None if size is None else padded_vocab_size(size, job.model.vocab_multiple)


def nodes_of(job: CheckJob, processes: int) -> int:
    """Return the number of nodes that a checked run takes on its cluster."""
    assert job.cluster is not None
    if job.processes is None:
        return node_counts.nodes(job, job.cluster)
    return -(-processes // processes_per_node(job.cluster))
