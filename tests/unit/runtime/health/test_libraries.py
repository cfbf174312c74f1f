"""Libraries: absent, broken, of another version, on machines with and without GPUs."""

from pathlib import Path

import pytest

from hybrid_train.jobs.doctor import MACHINE_CHECKS
from hybrid_train.runtime.health import system
from hybrid_train.runtime.health.machine import Finding, Grade, Machine
from hybrid_train.runtime.health.probe import Library
from hybrid_train.runtime.optional import State
from tests.unit.runtime.health.machines import ABSENT, cpu_machine, gpu_machine, with_library

BROKEN = Library(State.broken, "1.0", "ImportError: undefined symbol: _ZN3c10")
KERNELS = {
    "transformer_engine": "Transformer Engine",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "apex": "apex",
}


def kernels(machine: Machine, module: str) -> Finding:
    return MACHINE_CHECKS[KERNELS[module]](machine)


@pytest.mark.parametrize("version", [(3, 11, 9), (3, 13, 0)])
def test_another_python_is_broken(tmp_path: Path, version: tuple[int, ...]) -> None:
    found = system.python(cpu_machine(tmp_path, python=version))
    assert found.grade is Grade.broken
    assert "3.12" in found.fix


@pytest.mark.parametrize("module", KERNELS)
def test_a_library_of_kernels_is_not_missed_without_a_gpu(tmp_path: Path, module: str) -> None:
    found = kernels(cpu_machine(tmp_path), module)
    assert found.grade is Grade.ok
    assert "not needed here" in found.found


@pytest.mark.parametrize("module", ["transformer_engine", "mamba_ssm", "causal_conv1d"])
def test_a_library_of_kernels_is_missed_beside_a_gpu(tmp_path: Path, module: str) -> None:
    machine = with_library(gpu_machine(tmp_path), module, ABSENT)
    found = kernels(machine, module)
    assert found.grade is Grade.warning
    assert found.fix.startswith("pip install -c constraints.txt --no-build-isolation")
    hidden = gpu_machine(
        tmp_path, libraries=machine.libraries, environment={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert kernels(hidden, module).grade is Grade.ok


def test_apex_is_missed_only_where_transformer_engine_is_missing_too(tmp_path: Path) -> None:
    without = with_library(gpu_machine(tmp_path), "apex", ABSENT)
    assert kernels(without, "apex").grade is Grade.ok
    neither = with_library(without, "transformer_engine", ABSENT)
    assert kernels(neither, "apex").grade is Grade.warning


@pytest.mark.parametrize("module", KERNELS)
def test_a_library_that_cannot_be_imported_is_broken_wherever(tmp_path: Path, module: str) -> None:
    found = kernels(with_library(cpu_machine(tmp_path), module, BROKEN), module)
    assert found.grade is Grade.broken
    assert "undefined symbol: _ZN3c10" in found.found
    assert "pip uninstall" in found.fix


@pytest.mark.parametrize("module", ["torch", "megatron.core"])
def test_what_a_run_cannot_do_without_is_broken_when_it_is_absent(
    tmp_path: Path, module: str
) -> None:
    check = {"torch": system.torch, "megatron.core": system.megatron}[module]
    for library in (ABSENT, BROKEN):
        found = check(with_library(cpu_machine(tmp_path), module, library))
        assert found.grade is Grade.broken
        assert "constraints.txt" in found.fix


@pytest.mark.parametrize(
    ("version", "grade"),
    [
        ("2.11.0", Grade.ok),
        ("2.11.0+cpu", Grade.ok),
        ("2.12.0", Grade.warning),
        ("2.11.0a0+a6c236b9fd.nv26.03", Grade.warning),
    ],
)
def test_another_version_than_the_tested_one_is_a_warning(
    tmp_path: Path, version: str, grade: Grade
) -> None:
    torch = Library(State.working, version)
    found = system.torch(with_library(cpu_machine(tmp_path), "torch", torch))
    assert found.grade is grade
    assert ("2.11.0" in found.found, bool(found.fix)) == (True, grade is Grade.warning)


def test_a_megatron_core_that_no_run_starts_with_is_broken(tmp_path: Path) -> None:
    newer = Library(State.working, "0.20.0")
    found = system.megatron(with_library(cpu_machine(tmp_path), "megatron.core", newer))
    assert found.grade is Grade.broken
    assert "newer than 0.19.2" in found.found
    assert "megatron-core" in found.fix


def test_transformers_may_be_missing_but_not_be_older_than_what_was_tried(tmp_path: Path) -> None:
    machine = cpu_machine(tmp_path)
    assert system.transformers(machine).grade is Grade.ok
    for version, grade in {"5.23.0": Grade.ok, "5.10.2": Grade.ok, "4.57.1": Grade.warning}.items():
        library = Library(State.working, version)
        found = system.transformers(with_library(machine, "transformers", library))
        assert found.grade is grade
    broken = system.transformers(with_library(machine, "transformers", BROKEN))
    assert broken.grade is Grade.broken


def test_nvidias_build_of_the_pinned_release_is_fine_in_its_image_alone(tmp_path: Path) -> None:
    torch = Library(State.working, "2.11.0a0+a6c236b9fd.nv26.03")
    image = cpu_machine(tmp_path, environment={"NVIDIA_PYTORCH_VERSION": "26.03"})
    assert system.torch(with_library(image, "torch", torch)).grade is Grade.ok
    newer = Library(State.working, "2.12.0a0+0291f960b6.nv26.04")
    assert system.torch(with_library(image, "torch", newer)).grade is Grade.warning


def test_a_library_that_is_in_no_table_may_have_any_version(tmp_path: Path) -> None:
    apex = Library(State.working, "22.4")
    assert kernels(with_library(gpu_machine(tmp_path), "apex", apex), "apex").grade is Grade.ok
