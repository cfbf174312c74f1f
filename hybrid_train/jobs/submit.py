"""The job `submit`: a training run and its batch script, queued on a cluster with SLURM.

It needs no torch. What is refused has written and queued nothing.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from hybrid_train.config import compose, describe, frozen, rules_of_cluster
from hybrid_train.config.commands import command, setting
from hybrid_train.config.launcher import require_alone
from hybrid_train.config.rules_of_data import data_is_chosen
from hybrid_train.config.secrets import masked
from hybrid_train.jobs import code_snapshot, multirun
from hybrid_train.jobs.run_folder import require_same_run
from hybrid_train.schema.cluster import PORTS, Cluster, processes_per_node, seconds
from hybrid_train.schema.job_roots import SubmitJob, training_job
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted

_TIMEOUT_S = 60  # a controller that is busy answers late
_BLANK = re.compile(r"__([A-Z]+(?:_[A-Z]+)*)__")
_FOLDER_MODE = 0o750
_JOBS = "jobs.txt"  # in launch/ of a run folder: an id a line, newest last


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
        shared = set.intersection(*(set(rules_of_cluster.legal_nodes(job)) for job in self.jobs))
        return sorted(shared)


def plan(lines: Sequence[str], *, is_array: bool) -> Callable[[], None]:
    """Check a submission and return what shows it, for dry_run=true, or hands it to SLURM.

    Args:
        lines: overrides.
        is_array: whether every combination of their values is a run of its own (--multirun).

    Raises:
        ConfigError: with every problem found.
    """
    require_alone("submit")
    launch = code_snapshot.launch_dir()
    submission = _checked(lines, is_array=is_array)
    script = render_script(submission, (launch / "slurm" / "train.sbatch").read_text("utf-8"))
    if submission.jobs[0].dry_run:
        return lambda: _show_script(submission, script)
    return lambda: _submit(submission, script, launch)


def _checked(lines: Sequence[str], *, is_array: bool) -> Submission:
    """Compose every run and check it, its folder, and the cluster.

    Raises:
        ConfigError: with every problem found.
    """
    jobs: list[SubmitJob] = []
    found: list[Problem] = []
    for one in multirun.combinations(lines) if is_array else [list(lines)]:
        try:
            jobs.append(compose.compose("submit", one))
        except ConfigError as error:
            found += error.problems
            found += _cluster_problems(_drafted(one), one, [])
    if not found:
        if any(job.cluster != jobs[0].cluster or job.run_dir != jobs[0].run_dir for job in jobs):
            rule = "an array has one cluster and one run_dir; submit the others by themselves"
            found.append(Problem("--multirun", "cluster or run_dir", rule))
        submission = Submission(jobs, Path(jobs[0].run_dir).absolute(), is_array)
        found += _cluster_problems(jobs[0].cluster, lines, jobs)
        found += _folder_problems(submission)
        if not submission.legal_nodes:
            found.append(Problem("--multirun", "cluster.nodes", "there is no number for all runs"))
    if found:
        raise ConfigError(dict.fromkeys(found))
    return submission


def _drafted(lines: Sequence[str]) -> Cluster | None:
    """Return the cluster of a job that has problems elsewhere; None if it has them itself."""
    try:
        drafted = OmegaConf.to_object(compose.draft("submit", lines).config.cluster)
    except (UserError, ValueError):
        return None
    return drafted if isinstance(drafted, Cluster) else None


def _cluster_problems(
    cluster: Cluster | None, lines: Sequence[str], jobs: Sequence[SubmitJob]
) -> Iterator[Problem]:
    """Yield what SLURM itself knows of the cluster, where it is at hand.

    Args:
        cluster: that the jobs share; None if it has problems itself.
        lines: overrides.
        jobs: the jobs, if they have no problems.

    Raises:
        UserError: if there is a SLURM that does not answer, and the job is to be queued.
    """
    if not any(line.startswith("cluster=") for line in lines):
        options = describe.descriptions("cluster")
        yield Problem("cluster", "null", f"must be one of {', '.join(options)}")
    elif cluster is not None and has_slurm():
        try:
            known = partitions()
        except UserError as error:
            if not any(line.lower() == "dry_run=true" for line in lines):
                raise
            _say(f"the partition was not looked up: {str(error).splitlines()[0]}")
            return
        yield from _partition_problems(cluster, known, jobs)


def _partition_problems(
    cluster: Cluster, known: dict[str, Partition], jobs: Sequence[SubmitJob]
) -> Iterator[Problem]:
    """Yield what the partition cannot give; a job that waits for ever is refused here."""
    name = cluster.partition or next((one.name for one in known.values() if one.is_default), None)
    if name not in known:
        rule = f"sinfo lists {', '.join(known)}"
        yield Problem("cluster.partition", name or "null", rule, nearest(name or "", known))
        return
    partition, limit_s = known[name], seconds(cluster.time_limit)
    if cluster.nodes is not None and (cluster.min_nodes or cluster.nodes) > partition.nodes:
        path = "cluster.nodes" if cluster.min_nodes is None else "cluster.min_nodes"
        rule = f"partition {name} has {counted(partition.nodes, 'node')}"
        legal = rules_of_cluster.most_nodes(jobs, partition.nodes)
        if jobs and legal is None:
            rule += ", too few for the layout and the batch"
        yield Problem(path, cluster.min_nodes or cluster.nodes, rule, legal)
    if partition.limit_s is not None and limit_s is not None and limit_s > partition.limit_s:
        most = f"{partition.limit_s // 60}"
        rule = f"partition {name} allows {most} minutes"
        yield Problem("cluster.time_limit", cluster.time_limit, rule, most)


def _folder_problems(submission: Submission) -> Iterator[Problem]:
    """Yield what forbids the run folders: another run, or one that is queued already."""
    path = str(submission.run_dir)
    for job, run_dir in zip(submission.jobs, submission.run_dirs, strict=True):
        try:
            require_same_run(_of_folder(job, run_dir))
        except UserError as error:
            yield Problem("run_dir", run_dir, str(error))
    jobs = submission.run_dir / "launch" / _JOBS
    last = jobs.read_text("utf-8").split()[-1] if jobs.exists() else None
    state = job_state(last) if last and has_slurm() else None
    if state is not None:
        rule = f"job {last} of this folder is {state}; wait for it, or scancel {last}"
        yield Problem("run_dir", path, rule)


def _of_folder(job: SubmitJob, run_dir: Path) -> TrainJob:
    """Return the run of a job as it is frozen, with its folder named from the root."""
    run = training_job(job)
    run.run_dir = str(run_dir)
    return run


def _show_script(submission: Submission, script: str) -> None:
    """Print the script, and beside it what it comes to."""
    sys.stdout.write(script)
    sys.stdout.flush()
    _say(f"nothing was submitted; this would be {_in_words(submission)}")
    unset = list(data_is_chosen(submission.jobs[0]))
    if unset:
        _say("still to be set before it can be submitted:")
        for problem in unset:
            _say(f"  {problem.path}: {problem.rule}")


def _say(text: str) -> None:
    sys.stderr.write(masked(f"submit: {text}\n"))


def _in_words(submission: Submission) -> str:
    """Say how large a submission is."""
    legal, own = submission.legal_nodes, processes_per_node(submission.jobs[0].cluster)
    nodes = counted(legal[-1], "node")
    size = f"{nodes} x {counted(own, 'process')} = {legal[-1] * own:,}"
    fewer = f", or fewer nodes: {', '.join(map(str, legal[:-1]))}" if len(legal) > 1 else ""
    runs = (
        f"an array of {counted(len(submission.jobs), 'run')}, each " if submission.is_array else ""
    )
    return f"{runs}{size}{fewer}"


def _submit(submission: Submission, script: str, launch: Path) -> None:
    """Write the run folders and hand the script to SLURM.

    Raises:
        UserError: if there is no SLURM, or it refuses.
    """
    if not has_slurm():
        raise UserError("sbatch was not found; submit from a login node, or look with --dry-run")
    require_acceptable(script)
    run_dirs = submission.run_dirs
    launch_dir = submission.run_dir / "launch"
    for folder in (submission.run_dir, launch_dir, *run_dirs, *(one / "logs" for one in run_dirs)):
        folder.mkdir(_FOLDER_MODE, parents=True, exist_ok=True)
    path = launch_dir / "job.sbatch"
    path.write_text(script, encoding="utf-8")
    for job, run_dir in zip(submission.jobs, run_dirs, strict=True):
        frozen.freeze(_of_folder(job, run_dir), run_dir)
    code_snapshot.write_snapshot(submission.run_dir / "code", launch)
    number = queue_script(path)
    with (launch_dir / _JOBS).open("a", encoding="utf-8") as file:
        file.write(number + "\n")
    watched = run_dirs[0]
    sys.stdout.write(
        f"job {number}: {_in_words(submission)}\n"
        f"  run folder   {submission.run_dir}\n"
        f"  watch        {command('status', setting('run_dir', watched))}\n"
        f"  log          tail -F {shlex.quote(f'{watched}/logs')}/slurm_*.log\n"
        f"  cancel       scancel {number} (the run saves; submit again to go on)\n"
    )


def render_script(submission: Submission, template: str) -> str:
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


def has_slurm() -> bool:
    """Tell whether this machine has the commands of SLURM."""
    return shutil.which("sbatch") is not None and shutil.which("sinfo") is not None


def partitions() -> dict[str, Partition]:
    """Return the partitions by name.

    Raises:
        UserError: if SLURM does not answer.
    """
    found: dict[str, Partition] = {}
    for line in _run_slurm(["sinfo", "--noheader", "--format=%P|%D|%l"]).splitlines():
        marked, nodes, limit = (part.strip() for part in line.split("|"))
        name = marked.rstrip("*")
        before = found[name].nodes if name in found else 0  # one line for each state of its nodes
        limit_s = None if limit == "infinite" else seconds(limit)
        found[name] = Partition(name, marked.endswith("*"), before + int(nodes), limit_s)
    return found


def job_state(job: str) -> str | None:
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
    _run_slurm(["sbatch", "--test-only"], script)


def queue_script(script: Path) -> str:
    """Hand a script to sbatch and return the id of the job.

    Raises:
        UserError: with what sbatch says, if it refuses.
    """
    return _run_slurm(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]


def _run_slurm(command: Sequence[str], given: str | None = None) -> str:
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
