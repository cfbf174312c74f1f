"""Machines that are made up: what the checks would see on them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_train.runtime.health.machine import Answer, Machine
from hybrid_train.runtime.health.probe import Library
from hybrid_train.runtime.health.speed import DeviceSpeed
from hybrid_train.runtime.optional import State

PINS = {"nvidia-nccl-cu13": "2.28.9"}
H100 = "NVIDIA H100 80GB HBM3"
ABSENT = Library(State.absent)
VERSIONS = {
    "torch": "2.11.0",
    "megatron.core": "0.19.2",
    "transformer_engine": "2.20.2",
    "mamba_ssm": "2.3.2.post1",
    "causal_conv1d": "1.7.0",
    "apex": "0.1",
    "transformers": "5.23.0",
}


class Commands:
    """Answers to commands, by how they begin; what is not there is no command."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.answers = dict(answers)

    def __call__(self, command: Sequence[str]) -> Answer | None:
        line = " ".join(command)
        return next((one for start, one in self.answers.items() if line.startswith(start)), None)


def torch_library(devices: Sequence[str] = (), **facts: Any) -> Library:
    told = {"cuda": "13.0", "devices": list(devices), "nccl": "2.28.9", **facts}
    return Library(State.working, "2.11.0", facts=told)


def cpu_machine(root: Path, **changes: Any) -> Machine:
    """A laptop without a GPU on which all is well."""
    (root / "dev/shm").mkdir(parents=True, exist_ok=True)
    libraries = dict.fromkeys(VERSIONS, ABSENT)
    libraries["megatron.core"] = Library(State.working, "0.19.2")
    libraries["torch"] = torch_library()
    well = Machine(
        libraries=libraries,
        pins=PINS,
        environment={},
        folder=root,
        root=root,
        python=(3, 12, 1),
        cores=4,
        ask=Commands({}),
        space=lambda _: (100 * 10**9, 50 * 10**9),
        soft_limit=lambda _: 65536.0,
        measure=lambda: [DeviceSpeed(f"cpu {n}", 5e10, 2e9) for n in range(2)],
    )
    return dataclasses.replace(well, **changes)


def gpu_machine(root: Path, number: int = 8, **changes: Any) -> Machine:
    """A node of GPUs on which all is well."""
    put(root, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64  580.95.05  Release")
    rows = "\n".join(f"{n}, {H100}, 580.95.05, 81559, 4" for n in range(number))
    libraries = {name: Library(State.working, version) for name, version in VERSIONS.items()}
    libraries["torch"] = torch_library([H100] * number)
    fits: dict[str, Any] = {
        "libraries": libraries,
        "ask": Commands({"nvidia-smi": Answer(0, rows)}),
        "measure": lambda: [DeviceSpeed(f"cuda {n}", 7e14, 4e11) for n in range(number)],
    }
    return cpu_machine(root, **{**fits, **changes})


def with_library(machine: Machine, module: str, library: Library) -> Machine:
    return dataclasses.replace(machine, libraries={**machine.libraries, module: library})


def put(root: Path, path: str, text: str = "") -> None:
    """Write a file of the system."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
