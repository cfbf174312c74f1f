"""What is made of measured speeds."""

from pathlib import Path

import pytest

from hybrid_train.runtime.health import gpus, speed
from hybrid_train.runtime.health.machine import Grade
from hybrid_train.runtime.health.speed import DeviceSpeed
from tests.unit.runtime.health.machines import cpu_machine, gpu_machine


def test_a_gpu_much_slower_than_its_siblings_is_named(tmp_path: Path) -> None:
    speeds = [DeviceSpeed(f"cuda {n}", 3e14 if n == 5 else 7e14, 4e11) for n in range(8)]
    found = gpus.gemm(gpu_machine(tmp_path, measure=lambda: speeds))
    assert found.grade is Grade.warning
    assert "cuda 5 is slower than 80% of the median" in found.found
    assert found.figures["cuda 5_flops_per_s"] == 3e14


def test_gpus_that_differ_a_little_are_fine(tmp_path: Path) -> None:
    speeds = [DeviceSpeed(f"cuda {n}", (700 - 10 * n) * 1e12, 4e11) for n in range(8)]
    found = gpus.gemm(gpu_machine(tmp_path, measure=lambda: speeds))
    assert found.grade is Grade.ok
    assert found.found.startswith("700, 690, 680")


def test_processes_of_one_cpu_are_added_not_compared(tmp_path: Path) -> None:
    speeds = [DeviceSpeed("cpu 0", 5e10, 2e9), DeviceSpeed("cpu 1", 1e10, 2e9)]
    found = gpus.gemm(cpu_machine(tmp_path, measure=lambda: speeds))
    assert (found.grade, found.figures) == (Grade.ok, {"cpu_flops_per_s": 6e10})


def test_a_device_that_fails_is_broken_with_its_error(tmp_path: Path) -> None:
    fault = "AcceleratorError: uncorrectable ECC error"
    speeds = [DeviceSpeed("cuda 0", 7e14, 4e11), DeviceSpeed("cuda 1", None, None, fault, fault)]
    machine = gpu_machine(tmp_path, measure=lambda: speeds)
    for check in (gpus.gemm, gpus.all_reduce):
        found = check(machine)
        assert found.grade is Grade.broken
        assert found.found == f"cuda 1: {fault}"
        assert found.fix


def test_the_slowest_process_is_the_speed_of_an_all_reduce(tmp_path: Path) -> None:
    speeds = [DeviceSpeed("cuda 0", 7e14, 4.5e11), DeviceSpeed("cuda 1", 7e14, 4e11)]
    found = gpus.all_reduce(gpu_machine(tmp_path, measure=lambda: speeds))
    assert found.found == "400 GB/s on the bus between 2 GPUs (NCCL)"


def test_one_gpu_has_no_bus(tmp_path: Path) -> None:
    machine = gpu_machine(tmp_path, 1, measure=lambda: [DeviceSpeed("cuda 0", 7e14)])
    assert gpus.all_reduce(machine).grade is Grade.ok


def test_all_gpus_are_measured_once_or_two_processes_of_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(speed, "measure", lambda *words, threads: asked.append((*words, threads)))
    for machine in (gpu_machine(tmp_path / "gpu"), cpu_machine(tmp_path / "cpu", cores=6)):
        measure = gpus.measurement(machine)
        measure()
        measure()
    assert asked == [("cuda", 8, 1), ("cpu", 2, 3)]
