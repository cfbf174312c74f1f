"""Gateway to the commands of SLURM: what a cluster has, what is queued, sbatch."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_train.schema.cluster import seconds
from hybrid_train.schema.problems import UserError

_TIMEOUT_S = 60  # a controller that is busy answers late


@dataclass(frozen=True)
class Partition:
    """One partition of a cluster.

    Attributes:
        name: as in `--partition`.
        is_default: whether jobs go there that name none.
        nodes: that it has, whatever their state.
        limit_s: longest time of a job in seconds; None for any.
    """

    name: str
    is_default: bool
    nodes: int
    limit_s: int | None


def is_here() -> bool:
    """Tell whether this machine has the commands of SLURM."""
    return shutil.which("sbatch") is not None and shutil.which("sinfo") is not None


def partitions() -> dict[str, Partition]:
    """Return the partitions by name.

    Raises:
        UserError: if SLURM does not answer.
    """
    found: dict[str, Partition] = {}
    for line in _run(["sinfo", "--noheader", "--format=%P|%D|%l"]).splitlines():
        marked, nodes, limit = (part.strip() for part in line.split("|"))
        name = marked.rstrip("*")
        before = found[name].nodes if name in found else 0  # one line for each state of its nodes
        limit_s = None if limit == "infinite" else seconds(limit)
        found[name] = Partition(name, marked.endswith("*"), before + int(nodes), limit_s)
    return found


def state(job: str) -> str | None:
    """Return the state of a job that is queued or runs, None for one that is gone."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    states = done.stdout.split()  # a job that was forgotten is an error of squeue, and gone
    return states[0] if states else None


def require_acceptable(script: str) -> None:
    """Ask SLURM whether a job could ever run; nothing is queued.

    Raises:
        UserError: with what sbatch says, if it could not.
    """
    _run(["sbatch", "--test-only"], script)


def submit(script: Path) -> str:
    """Hand a script to sbatch and return the id of the job.

    Raises:
        UserError: with what sbatch says, if it refuses.
    """
    return _run(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]


def _run(command: Sequence[str], given: str | None = None) -> str:
    """Run a command of SLURM and return what it writes."""
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} gives no answer within {_TIMEOUT_S} s") from error
    if done.returncode:
        raise UserError(f"{command[0]} refuses: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
