"""SLURM and its jobs, containers and the limits of control groups."""

from pathlib import Path

import pytest

from hybrid_train.runtime.health import system
from hybrid_train.runtime.health.machine import Answer, Finding, Grade
from tests.unit.runtime.health.machines import Commands, cpu_machine, put

UP = {
    "sinfo --version": Answer(0, "slurm-wlm 24.11.5"),
    "scontrol ping": Answer(0, "Slurmctld(primary) at head is UP"),
}
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "16"}


def in_job(tmp_path: Path, left: str) -> Finding:
    ask = Commands({**UP, "squeue --noheader --job 4711": Answer(0, left)})
    return system.slurm(cpu_machine(tmp_path, ask=ask, environment=JOB))


def test_a_job_tells_its_nodes_and_the_time_that_is_left(tmp_path: Path) -> None:
    found = in_job(tmp_path, "1-02:03:04")
    assert found.grade is Grade.ok
    assert "slurm-wlm 24.11.5, job 4711, nodes: 16, time left: 1-02:03:04" in found.found
    assert in_job(tmp_path, "UNLIMITED").grade is Grade.ok


def test_a_job_that_is_about_to_end_is_a_warning(tmp_path: Path) -> None:
    assert in_job(tmp_path, "9:59").grade is Grade.warning
    assert in_job(tmp_path, "10:00").grade is Grade.ok


def test_slurm_outside_a_job_and_no_slurm_are_fine(tmp_path: Path) -> None:
    assert "outside a job" in system.slurm(cpu_machine(tmp_path, ask=Commands(UP))).found
    nowhere = system.slurm(cpu_machine(tmp_path))
    assert (nowhere.grade, nowhere.found) == (Grade.ok, "not here: no sinfo")


def test_a_controller_that_is_down_is_a_warning(tmp_path: Path) -> None:
    down = {**UP, "scontrol ping": Answer(0, "Slurmctld(primary) at head is DOWN")}
    found = system.slurm(cpu_machine(tmp_path, ask=Commands(down)))
    assert found.grade is Grade.warning
    assert "DOWN" in found.found


def test_slurm_that_is_not_set_up_is_broken_inside_a_job_alone(tmp_path: Path) -> None:
    ask = Commands({"sinfo": Answer(1, "sinfo: error: no slurm.conf\nsinfo: fatal: end")})
    outside = system.slurm(cpu_machine(tmp_path, ask=ask))
    assert outside.grade is Grade.warning
    assert outside.found == "sinfo fails: sinfo: error: no slurm.conf"
    assert system.slurm(cpu_machine(tmp_path, ask=ask, environment=JOB)).grade is Grade.broken


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("03:04", 184),
        ("2:03:04", 7384),
        ("1-02:03:04", 93784),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_times_of_slurm_are_read(text: str, seconds: int | None) -> None:
    assert system.slurm_seconds(text) == seconds


@pytest.mark.parametrize(
    ("file", "variable", "name"),
    [
        (".dockerenv", "X", "Docker"),
        ("run/.containerenv", "X", "Podman"),
        ("x", "APPTAINER_CONTAINER", "Apptainer"),
        ("x", "ENROOT_ROOTFS", "enroot"),
        ("x", "KUBERNETES_SERVICE_HOST", "Kubernetes"),
        ("x", "NVIDIA_PYTORCH_VERSION", "NVIDIA PyTorch 1"),
        ("x", "X", "none"),
    ],
)
def test_a_container_is_recognised(tmp_path: Path, file: str, variable: str, name: str) -> None:
    put(tmp_path, file)
    found = system.container(cpu_machine(tmp_path, environment={variable: "1"}))
    assert found.found == f"{name}; limits: none"


def test_the_tightest_limit_around_a_process_counts(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/slurm/job_1/step_0\n")
    put(tmp_path, "sys/fs/cgroup/slurm/job_1/step_0/memory.max", "max\n")
    put(tmp_path, "sys/fs/cgroup/slurm/job_1/memory.max", "64000000000\n")
    put(tmp_path, "sys/fs/cgroup/slurm/memory.max", "256000000000\n")
    put(tmp_path, "sys/fs/cgroup/slurm/job_1/cpu.max", "400000 100000\n")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    found = system.container(cpu_machine(tmp_path))
    assert found.grade is Grade.ok
    assert found.found == "none; limits: memory 64 GB, processors 4"


def test_limits_of_the_first_version_of_control_groups_are_read(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "4:memory:/docker/1\n1:cpu,cpuacct:/docker/1\n0::/\n")
    # Inside a container its group is the root, while the path is that of the host.
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000000")
    put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000")
    put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    machine = cpu_machine(tmp_path)
    assert system.memory_limit(machine) == 2 * 10**9
    assert system.processor_limit(machine) == 0.5
    assert system.container(machine).grade is Grade.warning
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    assert system.container(machine).found == "none; limits: none"
