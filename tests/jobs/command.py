"""Runs `hybrid-train train` as a user does, and reads what it leaves behind.

A command is a fork of a process that has imported torch and Megatron (`tests/warm`), unless it is
asked to be `cold`: then Python is started anew, and so are the processes that it starts.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.warm import interpreter

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300  # far beyond what any of these commands takes
# What differs between equal runs.
TIMING = ("tokens_per_s", "step_time_s", "pause_s", "save_time_s", "validation_time_s", "mfu")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


def arguments(run_dir: Path, *overrides: str) -> list[str]:
    return ["train", "experiment=tiny_cpu", f"run_dir={run_dir}", "runtime.threads=1", *overrides]


def start(*words: str, processes: int = 1, cold: bool = False) -> subprocess.Popen[str]:
    """Start `hybrid-train WORDS`, under torchrun if it has several processes."""
    program = ["-m", "hybrid_train"]
    return start_program(*program, *words, processes=processes, cold=cold)


def start_program(*words: str, processes: int = 1, cold: bool = False) -> subprocess.Popen[str]:
    python = sys.executable if cold else interpreter.warm()
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [python, *launcher, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=interpreter.environment(),
        cwd=ROOT,
    )


def finish(process: subprocess.Popen[str]) -> Finished:
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Finished(process.returncode, out, err)


def train(run_dir: Path, *overrides: str, processes: int = 1, cold: bool = False) -> Finished:
    return finish(start(*arguments(run_dir, *overrides), processes=processes, cold=cold))


def signal_at_step(
    number: signal.Signals, step: int, run_dir: Path, *overrides: str, processes: int = 1
) -> Finished:
    """Train, and send a signal as soon as the metrics of a step are there."""
    process = start(*arguments(run_dir, *overrides), processes=processes)
    deadline = time.monotonic() + TIMEOUT_S
    while last_step(run_dir) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    return finish(process)


def last_step(run_dir: Path) -> int:
    """Count whole lines; a fresh run has one line a step."""
    try:
        return (run_dir / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def metrics(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def untimed(run_dir: Path) -> list[dict[str, float]]:
    """Metrics without those that two equal runs do not share."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in metrics(run_dir)]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint by its name: weights, moments, random states."""
    content: dict[str, Any] = {}
    _load_state_dict(
        content,
        storage_reader=FileSystemReader(run_dir / "checkpoints" / f"step_{step:08d}"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return dict(_leaves(content))


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{path}{name}", value


def assert_equal_to_the_bit(one: Path, other: Path, step: int) -> None:
    """Compare all tensors of the checkpoints of a step, and all metrics up to it."""
    mine, theirs = tensors(one, step), tensors(other, step)
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("optimizer.") for name in mine)
    assert any(name.startswith("random.") for name in mine)
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different
    assert untimed(one)[:step] == untimed(other)[:step]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, to see that a command changed nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
