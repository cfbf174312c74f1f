"""All checks together: sound machines pass, no fault of one check hides another."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_train.jobs.doctor import (
    MACHINE_CHECKS,
    MEASUREMENTS,
    findings,
)
from hybrid_train.runtime.health.machine import Finding, Grade, Machine
from hybrid_train.runtime.health.probe import Library
from hybrid_train.runtime.optional import State
from tests.unit.runtime.health.machines import cpu_machine, gpu_machine, with_library

ALL = {**MACHINE_CHECKS, **MEASUREMENTS}


@pytest.mark.parametrize("machine", [cpu_machine, gpu_machine])
def test_a_sound_machine_has_nothing_to_mend(machine: Callable, tmp_path: Path) -> None:
    found = dict(findings(machine(tmp_path), ALL))
    assert list(found) == list(ALL)
    assert {finding.grade for finding in found.values()} == {Grade.ok}
    assert not any(finding.fix for finding in found.values())


def test_what_is_not_ok_says_what_to_type(tmp_path: Path) -> None:
    nothing = {name: Library(State.absent) for name in cpu_machine(tmp_path).libraries}
    poor = gpu_machine(
        tmp_path,
        libraries=nothing,
        python=(3, 11, 0),
        space=lambda _: (10**8, 10**7),
        soft_limit=lambda _: 100.0,
    )
    found = dict(findings(poor, ALL))
    bad = {name: one for name, one in found.items() if one.grade is not Grade.ok}
    assert set(ALL) - set(bad) == {
        *("transformers", "driver", "locked memory", "SLURM", "container")
    }
    assert all(finding.fix for finding in bad.values())


def test_a_check_that_fails_is_broken_and_the_others_are_told(tmp_path: Path) -> None:
    def fail(_: Machine) -> Finding:
        raise PermissionError("/proc is not yours")

    found = dict(
        findings(cpu_machine(tmp_path), {"first": fail, "Python": MACHINE_CHECKS["Python"]})
    )
    assert found["first"].grade is Grade.broken
    assert "PermissionError: /proc is not yours" in found["first"].found
    assert found["Python"].grade is Grade.ok


def test_a_broken_torch_leaves_what_needs_none_alone(tmp_path: Path) -> None:
    sound = gpu_machine(tmp_path)
    broken = with_library(sound, "torch", Library(State.broken, "2.11.0", "OSError: libcudart"))

    def never() -> list:
        raise AssertionError("nothing can be measured without torch")

    found = dict(findings(dataclasses.replace(broken, measure=never), ALL))
    unwell = {name for name, finding in found.items() if finding.grade is not Grade.ok}
    needs_torch = {"torch", "CUDA", "GPUs", "NCCL", "GEMM", "all-reduce"}
    assert unwell == needs_torch
    assert "OSError: libcudart" in found["torch"].found
    assert all("fix torch first" in found[name].fix for name in needs_torch - {"torch"})
