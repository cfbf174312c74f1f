"""Checks of the system around a run: Python, libraries, disk, limits, SLURM, a container."""

import functools
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from hybrid_train.config.supported import LIBRARIES, plain_name
from hybrid_train.runtime import optional
from hybrid_train.runtime.health.machine import Finding, Machine, broken, ok, warning
from hybrid_train.runtime.health.probe import REQUIRED, Library
from hybrid_train.runtime.optional import State
from hybrid_train.schema.units import show_bytes

PYTHON = (3, 12)  # as in setup.py
INSTALL = "make setup, or: pip install -c constraints.txt -e ."
# What is of use on a GPU alone.
KERNELS = ("transformer_engine", "mamba_ssm", "causal_conv1d", "apex")
_TRANSFORMERS = "transformers"
_NOT_HERE = "not needed here: no GPU"

_GB = 10**9
_LEAST_FREE, _GOOD_FREE = _GB, 20 * _GB  # a small run; a few checkpoints of a small model
_GOOD_SHARED = _GB  # containers get 64 MB unless asked, and NCCL and loaders of data want more
# Each process holds a socket to its neighbours and the files of its data open.
_GOOD_FILES = {False: 1024, True: 4096}  # on GPUs
_GOOD_PROCESSES = 4096
_FOR_GOOD = "or set it for good in /etc/security/limits.conf; under SLURM, in the unit of slurmd"

_LITTLE_TIME_S = 600  # left to a job
_LITTLE_MEMORY = 4 * 10**9  # bytes; what the smallest run, its tools and caches get along with
_UNLIMITED = 1 << 60  # bytes; cgroup v1 writes a huge number where there is no limit
_SLURM_TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")
# How a container is told: a file of its engine, or a variable.
_CONTAINER_FILES = {".dockerenv": "Docker", "run/.containerenv": "Podman"}
_CONTAINER_VARIABLES = {
    "APPTAINER_CONTAINER": "Apptainer",
    "SINGULARITY_CONTAINER": "Singularity",
    "ENROOT_ROOTFS": "enroot",
    "KUBERNETES_SERVICE_HOST": "Kubernetes",
}


def python(machine: Machine) -> Finding:
    """Check the version of Python."""
    version = ".".join(map(str, machine.python))
    if machine.python[:2] != PYTHON:
        wanted = ".".join(map(str, PYTHON))
        return broken(
            f"{version}; the package is for {wanted}",
            f"install Python {wanted} and name it: make PYTHON=/path/to/python{wanted} setup",
        )
    return ok(version)


def torch(machine: Machine) -> Finding:
    """Check PyTorch."""
    return _required_library(machine, "torch")


def megatron(machine: Machine) -> Finding:
    """Check Megatron-Core."""
    return _required_library(machine, "megatron.core")


def _required_library(machine: Machine, module: str) -> Finding:
    library, distribution = machine.libraries[module], REQUIRED[module]
    if library.state is State.absent:
        return broken("not installed", INSTALL)
    if library.state is State.broken:
        again = f"pip install --force-reinstall -c constraints.txt {distribution}"
        return broken(f"installed, but cannot be imported: {library.error}", again)
    rebuilt = module == "torch" and machine.is_nvidias_image
    return _tried_version(library, distribution, rebuilt=rebuilt)


def _tried_version(library: Library, distribution: str, *, rebuilt: bool = False) -> Finding:
    """Hold the version of a library that works against the table of those that were tried."""
    version = library.version or "of unknown version"
    known = LIBRARIES.get(distribution)
    if library.version is None or known is None:
        return ok(version)
    fault = known.fault(version, rebuilt=rebuilt)
    if not fault:
        return ok(version)
    found, fix = f"{version}, {fault}", f"pip install -c constraints.txt {distribution}"
    return broken(found, fix) if known.others_refused else warning(found, fix)


def transformers(machine: Machine) -> Finding:
    """Check transformers, which tests and users of exports compare with."""
    library, known = machine.libraries[_TRANSFORMERS], optional.LIBRARIES[_TRANSFORMERS]
    if library.state is State.absent:
        return ok("not installed, needed for comparisons with Hugging Face alone")
    if library.state is State.broken:
        return _broken_library(library, known)
    return _tried_version(library, _TRANSFORMERS)


def _broken_library(library: Library, known: optional.OptionalLibrary) -> Finding:
    install = _pinned_install(known)
    return broken(
        f"installed, but cannot be imported: {library.error}",
        f"{install} --force-reinstall --no-deps; or: pip uninstall {known.distribution}",
    )


def _pinned_install(known: optional.OptionalLibrary) -> str:
    """Return the command that installs a library in the version of constraints.txt."""
    return known.install.replace("pip install", "pip install -c constraints.txt")


def kernels(module: str) -> Callable[[Machine], Finding]:
    """Return the check of a library of GPU kernels."""
    return functools.partial(_kernel_library, module=module)


def _kernel_library(machine: Machine, module: str) -> Finding:
    library, known = machine.libraries[module], optional.LIBRARIES[module]
    if library.state is State.broken:
        return _broken_library(library, known)
    if library.state is State.working:
        return _tried_version(library, plain_name(known.distribution))
    if not machine.uses_gpus:
        return ok(f"not installed, {_NOT_HERE}")
    if module == "apex" and machine.libraries["transformer_engine"].state is State.working:
        return ok("not installed, not needed: Transformer Engine has what it would be used for")
    return warning("not installed; slower parts of PyTorch take its place", _pinned_install(known))


def disk(machine: Machine) -> Finding:
    """Check the free space of the working folder, and that one may write there."""
    if not os.access(machine.folder, os.W_OK):
        return broken(f"{machine.folder} cannot be written", "work in a folder of your own")
    total, free = machine.space(machine.folder)
    found = f"{show_bytes(free)} of {show_bytes(total)} free in {machine.folder}"
    figures = {"disk_free_bytes": free}
    if free < _LEAST_FREE:
        return broken(found, "make room, or work on another disk: run_dir=/PATH")
    if free < _GOOD_FREE:
        return warning(found, "make room, or keep fewer checkpoints: checkpoint.keep=1", figures)
    return ok(found, figures)


def shared_memory(machine: Machine) -> Finding:
    """Check the size of /dev/shm."""
    if not machine.exists("dev/shm"):
        return warning("no /dev/shm", "mount -t tmpfs -o size=8g tmpfs /dev/shm")
    total, free = machine.space(machine.root / "dev/shm")
    found = f"{show_bytes(free)} of {show_bytes(total)} free in /dev/shm"
    if free < _GOOD_SHARED:
        fix = (
            "docker run --ipc host (or --shm-size 8g); elsewhere: mount -o remount,size=8g /dev/shm"
        )
        return warning(found, fix)
    return ok(found, {"shared_memory_bytes": total})


def open_files(machine: Machine) -> Finding:
    """Check how many files a process may open."""
    wanted = _GOOD_FILES[machine.uses_gpus]
    return _at_least(machine, resource.RLIMIT_NOFILE, wanted, "n")


def processes(machine: Machine) -> Finding:
    """Check how many processes and threads a user may have."""
    return _at_least(machine, resource.RLIMIT_NPROC, _GOOD_PROCESSES, "u")


def _at_least(machine: Machine, which: int, wanted: int, option: str) -> Finding:
    limit = machine.soft_limit(which)
    if limit < wanted:
        return warning(f"{limit:g}; {wanted} are wanted", f"ulimit -{option} {wanted}, {_FOR_GOOD}")
    return ok("no limit" if limit == float("inf") else f"{limit:.0f}")


def locked_memory(machine: Machine) -> Finding:
    """Check that memory can be locked, which InfiniBand needs to read and write it."""
    limit = machine.soft_limit(resource.RLIMIT_MEMLOCK)
    if limit == float("inf"):
        return ok("no limit")
    if machine.uses_gpus and machine.exists("sys/class/infiniband"):
        return warning(
            f"{show_bytes(limit)}, and InfiniBand needs it without limit",
            f"docker run --ulimit memlock=-1; elsewhere: ulimit -l unlimited, {_FOR_GOOD}",
        )
    return ok(f"{show_bytes(limit)}, enough here: no GPU beside InfiniBand")


LIMIT_CHECKS: dict[str, Callable[[Machine], Finding]] = {
    "disk": disk,
    "shared memory": shared_memory,
    "open files": open_files,
    "locked memory": locked_memory,
    "processes": processes,
}


def slurm(machine: Machine) -> Finding:
    """Check SLURM's commands and controller; inside a job its nodes and the time that is left."""
    version = machine.ask(["sinfo", "--version"])
    job = machine.environment.get("SLURM_JOB_ID")
    if version is None:
        return ok(f"job {job}, but no sinfo to ask" if job else "not here: no sinfo")
    if version.code:
        said = f"sinfo fails: {version.first_line}"
        fix = "export SLURM_CONF=/PATH/slurm.conf, or ask the administrators"
        return broken(said, fix) if job else warning(said, f"{fix}; runs without SLURM need none")
    controller = machine.ask(["scontrol", "ping"])
    if controller is None or controller.code or " UP" not in controller.text:
        said = controller.first_line if controller else "no scontrol"
        return warning(
            f"{version.text}, but its controller does not answer: {said}",
            "scontrol ping; systemctl status slurmctld on the controller's machine",
        )
    return _slurm_job(machine, version.text, job) if job else ok(f"{version.text}, outside a job")


def _slurm_job(machine: Machine, version: str, job: str) -> Finding:
    nodes = machine.environment.get("SLURM_JOB_NUM_NODES", "?")
    answer = machine.ask(["squeue", "--noheader", "--job", job, "--format", "%L"])
    left = answer.text if answer and not answer.code else ""
    found = f"{version}, job {job}, nodes: {nodes}, time left: {left or 'not known'}"
    seconds = slurm_seconds(left)
    if seconds is not None and seconds < _LITTLE_TIME_S:
        return warning(found, "ask for more: sbatch --time=..., scontrol update TimeLimit=...")
    return ok(found)


def slurm_seconds(text: str) -> int | None:
    """Read a time of SLURM's: "1-02:03:04", "2:03:04", "03:04"; None for one without end."""
    match = _SLURM_TIME.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def container(machine: Machine) -> Finding:
    """Check in which container this is, and the memory and processors that it may use."""
    names = [name for file, name in _CONTAINER_FILES.items() if machine.exists(file)]
    names += [
        name for variable, name in _CONTAINER_VARIABLES.items() if variable in machine.environment
    ]
    if machine.is_nvidias_image:
        names.append(f"NVIDIA PyTorch {machine.environment['NVIDIA_PYTORCH_VERSION']}")
    memory, processors = memory_limit(machine), processor_limit(machine)
    limits = [f"memory {show_bytes(memory)}"] if memory else []
    limits += [f"processors {processors:g}"] if processors else []
    where = ", ".join(names) or "none"
    found = f"{where}; limits: {', '.join(limits) or 'none'}"
    if memory and memory < _LITTLE_MEMORY:
        return warning(found, "ask for more: docker run --memory 16g, sbatch --mem=16G")
    if processors and processors < 1:
        return warning(found, "ask for more: docker run --cpus 2, sbatch --cpus-per-task=2")
    return ok(found)


def memory_limit(machine: Machine) -> int | None:
    """Return the bytes that the control groups of this process allow; None for no limit."""
    found = [machine.text(f"{folder}/memory.max") for folder in _control_groups(machine, None)]
    v1 = "memory.limit_in_bytes"
    found += [machine.text(f"{folder}/{v1}") for folder in _control_groups(machine, "memory")]
    limits = [int(text) for text in found if text and text.isdecimal()]
    return min((limit for limit in limits if limit < _UNLIMITED), default=None)


def processor_limit(machine: Machine) -> float | None:
    """Return how many processors' time the control groups allow; None for no limit."""
    shares = []
    for folder in _control_groups(machine, None):
        quota, _, period = (machine.text(f"{folder}/cpu.max") or "max").partition(" ")
        if quota.isdecimal():
            shares.append(int(quota) / int(period))
    for folder in _control_groups(machine, "cpu"):
        quota = machine.text(f"{folder}/cpu.cfs_quota_us") or "-1"
        if quota.isdecimal():
            shares.append(int(quota) / int(machine.text(f"{folder}/cpu.cfs_period_us") or 100_000))
    return min(shares, default=None)


def _control_groups(machine: Machine, controller: str | None) -> Iterator[str]:
    """Yield the folders of this process's control group and of those around it.

    Args:
        machine: whose.
        controller: of version 1; None for version 2, which has one tree.
    """
    base = "sys/fs/cgroup" + (f"/{controller}" if controller else "")
    for line in (machine.text("proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if (controller or "") in controllers.split(","):
            inner = PurePosixPath(path.lstrip("/"))
            # Inside a container the path may be that of the host: the root is looked at too.
            for part in (inner, *inner.parents):
                yield f"{base}/{part}"
