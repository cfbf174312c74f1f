"""Driver, CUDA of torch, GPUs and NCCL."""

import dataclasses
from pathlib import Path

import pytest

from hybrid_train.runtime.health import gpus
from hybrid_train.runtime.health.machine import Answer, Grade
from tests.unit.runtime.health.machines import (
    H100,
    Commands,
    cpu_machine,
    gpu_machine,
    put,
    torch_library,
    with_library,
)


def smi(*rows: str, code: int = 0) -> Commands:
    return Commands({"nvidia-smi": Answer(code, "\n".join(rows))})


def test_a_torch_without_cuda_is_broken_beside_a_gpu_alone(tmp_path: Path) -> None:
    torch = torch_library(cuda=None, nccl=None)
    assert gpus.cuda(with_library(cpu_machine(tmp_path), "torch", torch)).grade is Grade.ok
    beside = with_library(gpu_machine(tmp_path), "torch", torch)
    for found in (gpus.cuda(beside), gpus.nccl(beside)):
        assert found.grade is Grade.broken
        assert "pip install --force-reinstall -c constraints.txt torch" in found.fix


def test_what_torch_could_not_ask_is_broken(tmp_path: Path) -> None:
    torch = dataclasses.replace(torch_library(), facts={"fault": "RuntimeError: CUDA error 802"})
    found = gpus.cuda(with_library(gpu_machine(tmp_path), "torch", torch))
    assert found.grade is Grade.broken
    assert "CUDA error 802" in found.found


@pytest.mark.parametrize(
    ("version", "cuda", "grade"),
    [
        ("580.65.06", "13.0", Grade.ok),
        ("570.172.08", "13.0", Grade.broken),
        ("570.172.08", "12.8", Grade.ok),
        ("470.42.01", "12.8", Grade.broken),
    ],
)
def test_a_driver_older_than_the_cuda_of_torch_is_broken(
    tmp_path: Path, version: str, cuda: str, grade: Grade
) -> None:
    machine = gpu_machine(tmp_path, ask=smi(f"0, {H100}, {version}, 81559, 4"))
    found = gpus.driver(with_library(machine, "torch", torch_library(cuda=cuda)))
    assert found.grade is grade
    assert version in found.found


def test_an_older_driver_with_which_torch_sees_the_gpus_is_a_warning(tmp_path: Path) -> None:
    machine = gpu_machine(tmp_path, 1, ask=smi(f"0, {H100}, 570.172.08, 81559, 4"))
    found = gpus.driver(machine)
    assert found.grade is Grade.warning
    assert "580" in found.fix


def test_the_version_of_a_driver_is_known_without_nvidia_smi(tmp_path: Path) -> None:
    found = gpus.driver(gpu_machine(tmp_path, ask=Commands({})))
    assert (found.grade, found.found) == (Grade.ok, "580.95.05")


def test_a_driver_that_does_not_answer_is_broken(tmp_path: Path) -> None:
    failed = smi("NVIDIA-SMI has failed", "Make sure that ...", code=9)
    found = gpus.driver(gpu_machine(tmp_path, ask=failed))
    assert found.grade is Grade.broken
    assert "NVIDIA-SMI has failed" in found.found


@pytest.mark.parametrize(
    ("vendor", "kind", "grade"),
    [
        ("0x10de", "0x030200", Grade.warning),
        ("0x10de", "0x020700", Grade.ok),  # a network card of NVIDIA's
        ("0x8086", "0x030000", Grade.ok),
    ],
)
def test_a_gpu_on_the_bus_without_a_driver_is_a_warning(
    tmp_path: Path, vendor: str, kind: str, grade: Grade
) -> None:
    device = "sys/bus/pci/devices/0000:17:00.0"
    put(tmp_path, f"{device}/vendor", f"{vendor}\n")
    put(tmp_path, f"{device}/class", f"{kind}\n")
    found = gpus.driver(cpu_machine(tmp_path))
    assert found.grade is grade
    assert ("--gpus all" in found.fix) == (grade is Grade.warning)


def test_a_driver_whose_gpus_torch_does_not_see_is_broken_unless_they_are_hidden(
    tmp_path: Path,
) -> None:
    machine = with_library(gpu_machine(tmp_path), "torch", torch_library())
    assert gpus.gpus(machine).grade is Grade.broken
    for value in ("", "-1"):
        hidden = dataclasses.replace(machine, environment={"CUDA_VISIBLE_DEVICES": value})
        assert gpus.gpus(hidden).grade is Grade.ok
    chosen = dataclasses.replace(machine, environment={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert gpus.gpus(chosen).grade is Grade.broken


def test_gpus_of_two_kinds_are_a_warning(tmp_path: Path) -> None:
    mixed = torch_library([H100, "NVIDIA A100-SXM4-80GB"])
    found = gpus.gpus(with_library(gpu_machine(tmp_path), "torch", mixed))
    assert found.grade is Grade.warning
    assert "A100" in found.found


def test_a_gpu_that_others_use_is_named(tmp_path: Path) -> None:
    rows = [f"{n}, {H100}, 580.95.05, 81559, {40_000 if n == 3 else 4}" for n in range(8)]
    found = gpus.gpus(gpu_machine(tmp_path, ask=smi(*rows)))
    assert found.grade is Grade.warning
    assert found.found == f"8 x {H100}; in use: GPU 3 (41.9 GB of 85.5 GB)"


def test_another_nccl_is_a_warning_outside_nvidias_image(tmp_path: Path) -> None:
    newer = with_library(gpu_machine(tmp_path), "torch", torch_library([H100], nccl="2.29.7"))
    assert gpus.nccl(newer).grade is Grade.warning
    image = dataclasses.replace(newer, environment={"NVIDIA_PYTORCH_VERSION": "26.03"})
    assert gpus.nccl(image).grade is Grade.ok
