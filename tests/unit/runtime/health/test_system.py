"""Disk, shared memory and limits."""

import os
import resource
from pathlib import Path

import pytest

from hybrid_train.runtime.health import system
from hybrid_train.runtime.health.machine import Grade, soft_limit, space
from tests.unit.runtime.health.machines import cpu_machine, gpu_machine

GB = 10**9


@pytest.mark.parametrize(
    ("free", "grade"), [(0.5 * GB, Grade.broken), (5 * GB, Grade.warning), (30 * GB, Grade.ok)]
)
def test_a_full_disk_is_broken_and_a_small_one_a_warning(
    tmp_path: Path, free: float, grade: Grade
) -> None:
    found = system.disk(cpu_machine(tmp_path, space=lambda _: (100 * GB, int(free))))
    assert found.grade is grade
    assert str(tmp_path) in found.found


def test_a_folder_that_cannot_be_written_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # root may write anywhere, so the system's answer is replaced
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert system.disk(cpu_machine(tmp_path)).grade is Grade.broken


def test_the_shared_memory_of_a_plain_container_is_a_warning(tmp_path: Path) -> None:
    machine = cpu_machine(tmp_path, space=lambda _: (64 << 20, 64 << 20))
    found = system.shared_memory(machine)
    assert found.grade is Grade.warning
    assert "--shm-size" in found.fix
    (tmp_path / "dev/shm").rmdir()
    assert system.shared_memory(machine).grade is Grade.warning


def test_more_files_are_wanted_on_gpus(tmp_path: Path) -> None:
    def few(which: int) -> float:
        return 1024.0 if which == resource.RLIMIT_NOFILE else float("inf")

    assert system.open_files(cpu_machine(tmp_path, soft_limit=few)).grade is Grade.ok
    found = system.open_files(gpu_machine(tmp_path, soft_limit=few))
    assert found.grade is Grade.warning
    assert "ulimit -n 4096" in found.fix


def test_few_processes_are_a_warning(tmp_path: Path) -> None:
    found = system.processes(cpu_machine(tmp_path, soft_limit=lambda _: 1000.0))
    assert found.grade is Grade.warning
    assert "ulimit -u" in found.fix


def test_infiniband_wants_locked_memory_without_limit(tmp_path: Path) -> None:
    assert system.locked_memory(gpu_machine(tmp_path)).grade is Grade.ok
    (tmp_path / "sys/class/infiniband").mkdir(parents=True)
    found = system.locked_memory(gpu_machine(tmp_path))
    assert found.grade is Grade.warning
    assert "memlock=-1" in found.fix
    endless = gpu_machine(tmp_path, soft_limit=lambda _: float("inf"))
    assert system.locked_memory(endless).grade is Grade.ok


def test_the_system_is_asked_for_real(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        assert soft_limit(resource.RLIMIT_NOFILE) == soft - 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    statistics = os.statvfs(tmp_path)
    assert space(tmp_path)[0] == statistics.f_blocks * statistics.f_frsize
