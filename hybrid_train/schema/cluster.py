"""The cluster that a run is submitted to: what is asked of SLURM, and how a node is set up."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from hybrid_train.schema.limits import Count, CountOrNone, FileName, Name, Processes, Range, Workers
from hybrid_train.schema.problems import Problem

TIME_RULE = "must be a time of SLURM: minutes, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"
PORTS = 1000  # a job takes `port` + its id modulo this, so that two jobs on a node do not meet
Port = Annotated[int, Range(1024, 65535 - PORTS)]
Notice = Annotated[int, Range(1, 65535)]  # as SLURM takes it
_MINUTES = re.compile(r"\d{1,9}")
_DAYS = re.compile(r"(\d{1,6})-(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?")
_CLOCK = re.compile(r"(?:(\d{1,9}):)?(\d{1,9}):(\d{1,9})")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_CREDENTIAL = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_WORD = re.compile(r"[\w.,@+:-]+")  # what a line of #SBATCH takes without quotes
_OPTION = re.compile(r"--([a-z-]+)(?:=\S*)?")
_OURS = {  # options of sbatch that other settings write, or that the scripts count on
    "account": "cluster.account",
    "array": "--multirun",
    "export": "cluster.environment",
    "job-name": "run_dir",
    "no-requeue": "cluster.requeues_without_progress",
    "nodes": "cluster.nodes and cluster.min_nodes",
    "ntasks": "cluster.processes_per_node",
    "ntasks-per-node": "cluster.processes_per_node",
    "open-mode": "nothing: logs of all attempts stay in one file",
    "output": "run_dir",
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "requeue": "cluster.requeues_without_progress",
    "signal": "cluster.signal_s",
    "time": "cluster.time_limit",
}


def seconds(text: str) -> int | None:
    """Read a time of SLURM: "90" and "1:30:00" -> 5400; None if it cannot be read."""
    text = text.strip()
    if _MINUTES.fullmatch(text):
        return int(text) * 60
    if days := _DAYS.fullmatch(text):
        number, hours, minutes, rest = (int(part or 0) for part in days.groups())
        return ((number * 24 + hours) * 60 + minutes) * 60 + rest
    if clock := _CLOCK.fullmatch(text):
        hours, minutes, rest = (int(part or 0) for part in clock.groups())
        return (hours * 60 + minutes) * 60 + rest
    return None


@dataclass(kw_only=True)
class Container:
    """A container that pyxis starts on each node (`srun --container-image`)."""

    image: FileName | None = None  # a squashfs file or a name in a registry; None: no container
    mounts: list[str] = field(
        default_factory=list
    )  # "SOURCE:TARGET"; the run folder comes by itself
    python: FileName = "python3"  # the Python inside

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        for number, mount in enumerate(self.mounts):
            if "," in mount or not all(mount.split(":")):
                rule = "must be SOURCE:TARGET or SOURCE:TARGET:FLAGS, one mount an entry"
                yield Problem(f"mounts.{number}", mount, rule)
        if self.mounts and self.image is None:
            yield Problem("mounts", self.mounts, "needs cluster.container.image", "[]")


@dataclass(kw_only=True)
class Cluster:
    """What is asked of SLURM, how a node is set up, and how the job looks after itself."""

    partition: Name | None = None  # None: the default of the cluster, as for account and qos
    account: Name | None = None
    qos: Name | None = None
    nodes: Processes | None = None  # None: the fewest that the plan can run on
    min_nodes: Processes | None = None  # fewer are taken when there are no more; None: as `nodes`
    gpus_per_node: Annotated[int, Range(0, 1024)] = 8  # 0: none are asked for
    hardware: Name | None = None  # which GPUs: a card of conf/hardware; None: they are not known
    processes_per_node: Workers | None = None  # None: one a GPU
    time_limit: str = "1-00:00:00"
    container: Container = field(default_factory=Container)
    environment: dict[str, str] = field(default_factory=dict)  # exported on every node
    setup: list[str] = field(default_factory=list)  # shell lines before all else: module load ...
    port: Port = 29500  # of the rendezvous: the first of `PORTS`
    signal_s: Notice = 600  # before the time limit, the run saves and is queued again
    requeues_without_progress: Count = 3  # so many attempts that end at one step end the job
    max_restarts: CountOrNone = 3  # of failed workers inside one job, by torchrun
    sbatch: list[str] = field(default_factory=list)  # further options: "--exclusive"

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from self._size_problems()
        yield from self._time_problems()
        yield from self._text_problems()

    def _size_problems(self) -> Iterator[Problem]:
        if self.nodes is not None and self.min_nodes is not None and self.min_nodes > self.nodes:
            rule = f"must be at most cluster.nodes ({self.nodes})"
            yield Problem("min_nodes", self.min_nodes, rule, self.nodes)
        if not self.gpus_per_node and self.processes_per_node is None:
            yield Problem("processes_per_node", "null", "must be set where gpus_per_node is 0", 1)
        if self.hardware is not None and not self.gpus_per_node:
            yield Problem(
                "hardware", self.hardware, "needs cluster.gpus_per_node > 0, or must be null"
            )
        if self.gpus_per_node and (self.processes_per_node or 0) > self.gpus_per_node:
            rule = f"must be at most cluster.gpus_per_node ({self.gpus_per_node}): one a GPU"
            yield Problem("processes_per_node", self.processes_per_node, rule, self.gpus_per_node)

    def _time_problems(self) -> Iterator[Problem]:
        limit_s = seconds(self.time_limit)
        if limit_s is None:
            yield Problem("time_limit", self.time_limit, TIME_RULE, "1-00:00:00")
        elif limit_s <= self.signal_s:
            rule = f"must be more than cluster.signal_s ({self.signal_s} s), the time to save"
            yield Problem("time_limit", self.time_limit, rule)

    def _text_problems(self) -> Iterator[Problem]:
        for name in ("partition", "account", "qos"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                yield Problem(name, value, "must be one word, as SLURM lists it")
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                yield Problem("environment", name, "is no name of a variable")
            elif _CREDENTIAL.search(name):
                rule = "looks like a credential; export it before submitting, sbatch passes it on"
                yield Problem("environment", name, rule)
        for number, line in enumerate(self.sbatch):
            option = _OPTION.fullmatch(line)
            if option is None:
                rule = "must be one long option of sbatch, such as --exclusive or --mem=0"
                yield Problem(f"sbatch.{number}", line, rule)
            elif option[1] in _OURS:
                yield Problem(f"sbatch.{number}", line, f"is set by {_OURS[option[1]]}")


def processes_per_node(cluster: Cluster) -> int:
    """Return the number of processes that torchrun starts on a node."""
    return cluster.processes_per_node or max(1, cluster.gpus_per_node)
