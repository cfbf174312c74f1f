"""Imports libraries in a process of their own, since a broken one may end it, and tells of each.

As a program it takes a file to write to and the names of modules; it adds a line of JSON for each.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_train.runtime import optional
from hybrid_train.runtime.heartbeat import how_it_ended
from hybrid_train.runtime.optional import State

PROBE_S = 120.0  # for all; torch alone takes several seconds from a network disk
# What a run cannot do without, by module.
REQUIRED = {"torch": "torch", "megatron.core": "megatron-core"}


@dataclass(frozen=True)
class Library:
    """What came of the import of a library."""

    state: State
    version: str | None = None
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # of torch alone


def libraries(modules: Sequence[str], limit_s: float = PROBE_S) -> dict[str, Library]:
    """Import modules in other processes: one process, and another after each that it died of."""
    found: dict[str, Library] = {}
    while left := [module for module in modules if module not in found]:
        said, end = _try(left, limit_s)
        found |= {module: said[module] for module in left if module in said}
        if dead := next((module for module in left if module not in found), None):
            found[dead] = Library(State.broken, error=f"the import ended the process: {end}")
    return found


def _try(modules: Sequence[str], limit_s: float) -> tuple[dict[str, Library], str]:
    """Import in one process; return what it told before its end, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.jsonl"
        command = [sys.executable, "-m", __name__, str(file), *modules]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit_s, check=False
            )
            end = how_it_ended(done.returncode, done.stderr)
        except subprocess.TimeoutExpired:
            end = f"no answer within {limit_s:g} s"
        lines = file.read_text().splitlines() if file.exists() else []
    return {module: _library(facts) for module, facts in map(json.loads, lines)}, end


def _library(told: Mapping[str, Any]) -> Library:
    return Library(State(told["state"]), told["version"], told["error"], told["facts"])


def torch_facts() -> dict[str, Any]:
    """Ask torch what it was built with and what it sees."""
    import torch

    seen = torch.cuda.is_available()
    devices = [
        torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count() if seen else 0)
    ]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
    return {"cuda": torch.version.cuda, "devices": devices, "nccl": nccl}


def _tell(module: str) -> dict[str, Any]:
    distribution = REQUIRED.get(module) or optional.LIBRARIES[module].distribution
    status = optional.look(module, distribution)
    facts: dict[str, Any] = {}
    error = status.error
    if module == "torch" and status.state is State.working:
        try:
            facts = torch_facts()
        except Exception as fault:  # any: what a broken driver raises is not known
            facts = {"fault": f"{type(fault).__name__}: {fault}"}
    state = status.state.value
    return {"state": state, "version": status.version, "error": error, "facts": facts}


def main(file: str, modules: Iterable[str]) -> None:
    """Import modules and write down what came of each as soon as it is known."""
    for module in modules:
        told = _tell(module)
        with Path(file).open("a") as out:
            out.write(json.dumps([module, told]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
