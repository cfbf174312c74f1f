"""Rules about a run and the cluster that it is submitted to."""

import re
from collections.abc import Iterator
from pathlib import Path

from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Device
from hybrid_train.schema.submit import SubmitJob
from hybrid_train.schema.train import TrainJob

# The path stands in lines of sbatch, which quotes nothing, and takes % and \ for its own.
_PLAIN_PATH = re.compile(r"[\w./+=@~-]+")


def cluster_fits_the_run(job: TrainJob, _: int) -> Iterator[Problem]:
    """The nodes have what the run asks for, and SLURM can write its log into the run folder."""
    if not isinstance(job, SubmitJob):
        return
    device, gpus = job.runtime.device, job.cluster.gpus_per_node
    if device is Device.cuda and not gpus:
        yield Problem("runtime.device", "cuda", "needs cluster.gpus_per_node > 0", "cpu")
    if device is Device.cpu and gpus:
        rule = f"leaves {gpus} GPUs of every node idle; take another cluster=..."
        yield Problem("runtime.device", "cpu", rule, "auto")
    path = str(Path(job.run_dir).absolute())
    if job.run_dir and not _PLAIN_PATH.fullmatch(path):
        rule = f"SLURM takes letters, digits and ./+=@~_- in a path; this one is {path}"
        yield Problem("run_dir", job.run_dir, rule)
    image = job.cluster.container.image
    if image is not None and image.startswith(("/", ".")) and not Path(image).is_file():
        yield Problem("cluster.container.image", image, "there is no such file")
