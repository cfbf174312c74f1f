"""The batch script of a submission: launch/slurm/train.sbatch with values for its blanks."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_train.config import node_counts
from hybrid_train.schema.cluster import PORTS, Cluster, processes_per_node, seconds
from hybrid_train.schema.submit import SubmitJob

_BLANK = re.compile(r"__([A-Z]+(?:_[A-Z]+)*)__")


@dataclass(frozen=True)
class Submission:
    """What one call of sbatch starts.

    Attributes:
        jobs: one run, or the elements of an array; all on the same cluster.
        run_dir: of the run; of an array the folder that holds a run folder 0, 1, ... for each.
        is_array: whether it is an array.
    """

    jobs: Sequence[SubmitJob]
    run_dir: Path
    is_array: bool

    @property
    def run_dirs(self) -> list[Path]:
        """The run folder of each job."""
        return (
            [self.run_dir / str(n) for n in range(len(self.jobs))]
            if self.is_array
            else [self.run_dir]
        )

    @property
    def legal_nodes(self) -> list[int]:
        """The node counts on which every job can run, ascending."""
        shared = set.intersection(*(set(node_counts.legal(job)) for job in self.jobs))
        return sorted(shared)


def render(submission: Submission, template: str) -> str:
    """Fill the blanks of the template, `__NAME__`; a line that stays empty is left out."""
    values = _values(submission)
    lines = []
    for line in template.splitlines():
        filled = _BLANK.sub(lambda blank: values[blank[1]], line)
        if filled.strip() or not line.strip():
            lines.append(filled)
    return "\n".join(lines) + "\n"


def _values(submission: Submission) -> dict[str, str]:
    cluster, run_dir = submission.jobs[0].cluster, submission.run_dir
    legal = submission.legal_nodes
    quoted = shlex.quote(str(run_dir))
    element = '/"$SLURM_ARRAY_TASK_ID"' if submission.is_array else ""
    log = f"{run_dir}/%a/logs" if submission.is_array else f"{run_dir}/logs"
    return {
        "JOB_NAME": run_dir.name,
        "NODES": str(legal[0]) if len(legal) == 1 else f"{legal[0]}-{legal[-1]}",
        "LEGAL_NODES": " ".join(map(str, legal)),
        "TIME_LIMIT": cluster.time_limit,
        "LIMIT_S": str(seconds(cluster.time_limit)),
        "SIGNAL_S": str(cluster.signal_s),
        "WORKING_FOLDER": str(Path.cwd()),
        "LOG": f"{log}/slurm_%j.log",
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in _options(submission)),
        "RUN_DIR": quoted + element,
        "CODE": f"{quoted}/code",
        "LAUNCH": f"{quoted}/launch",
        "PROCESSES_PER_NODE": str(processes_per_node(cluster)),
        "PYTHON": shlex.quote(_python(cluster)),
        "CONTAINER": shlex.join(_container(cluster, run_dir)),
        "ENVIRONMENT": "\n".join(
            f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()
        ),
        "SETUP": "\n".join(cluster.setup),
        "PORT": str(cluster.port),
        "PORTS": str(PORTS),
        "MAX_RESTARTS": str(cluster.max_restarts),
        "REQUEUES": str(cluster.requeues_without_progress),
    }


def _options(submission: Submission) -> list[str]:
    """Return the options of sbatch that are left out where they are not set."""
    cluster = submission.jobs[0].cluster
    named = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    if cluster.gpus_per_node:
        options.append(f"--gpus-per-node={cluster.gpus_per_node}")
    if submission.is_array:
        options.append(f"--array=0-{len(submission.jobs) - 1}")
    return options + cluster.sbatch


def _python(cluster: Cluster) -> str:
    """Return the Python of the run: the one that submits, or that of the container."""
    return sys.executable if cluster.container.image is None else cluster.container.python


def _container(cluster: Cluster, run_dir: Path) -> list[str]:
    """Return the options of srun that pyxis reads."""
    container = cluster.container
    if container.image is None:
        return []
    mounts = ",".join([f"{run_dir}:{run_dir}", *container.mounts])
    return [
        f"--container-image={container.image}",
        f"--container-mounts={mounts}",
        "--no-container-mount-home",
    ]
