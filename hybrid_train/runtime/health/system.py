"""Checks of what the system gives a process: disk, shared memory, limits."""

import os
import resource
from collections.abc import Callable

from hybrid_train.runtime.health.findings import Finding, broken, ok, warning
from hybrid_train.runtime.health.machine import Machine
from hybrid_train.schema.units import show_bytes

_GB = 10**9
_LEAST_FREE, _GOOD_FREE = _GB, 20 * _GB  # a small run; a few checkpoints of a small model
_GOOD_SHARED = _GB  # containers get 64 MB unless asked, and NCCL and loaders of data want more
# Each process holds a socket to its neighbours and the files of its data open.
_GOOD_FILES = {False: 1024, True: 4096}  # on GPUs
_GOOD_PROCESSES = 4096
_LIMITS = "or set it for good in /etc/security/limits.conf; under SLURM, in the unit of slurmd"


def disk(machine: Machine) -> Finding:
    """Check the free space of the working folder, and that one may write there."""
    if not os.access(machine.folder, os.W_OK):
        return broken(f"{machine.folder} cannot be written", "work in a folder of your own")
    total, free = machine.space(machine.folder)
    found = f"{show_bytes(free)} of {show_bytes(total)} free in {machine.folder}"
    if free < _LEAST_FREE:
        return broken(found, "make room, or work on another disk: run_dir=/PATH")
    if free < _GOOD_FREE:
        return warning(found, "make room, or keep fewer checkpoints: checkpoint.keep=1")
    return ok(found, {"disk_free_bytes": free})


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
        return warning(f"{limit:g}; {wanted} are wanted", f"ulimit -{option} {wanted}, {_LIMITS}")
    return ok("no limit" if limit == float("inf") else f"{limit:.0f}")


def locked_memory(machine: Machine) -> Finding:
    """Check that memory can be locked, which InfiniBand needs to read and write it."""
    limit = machine.soft_limit(resource.RLIMIT_MEMLOCK)
    if limit == float("inf"):
        return ok("no limit")
    if machine.uses_gpus and machine.exists("sys/class/infiniband"):
        return warning(
            f"{show_bytes(limit)}, and InfiniBand needs it without limit",
            f"docker run --ulimit memlock=-1; elsewhere: ulimit -l unlimited, {_LIMITS}",
        )
    return ok(f"{show_bytes(limit)}, enough here: no GPU beside InfiniBand")


CHECKS: dict[str, Callable[[Machine], Finding]] = {
    "disk": disk,
    "shared memory": shared_memory,
    "open files": open_files,
    "locked memory": locked_memory,
    "processes": processes,
}
