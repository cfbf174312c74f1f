"""What the profiling hooks do on a GPU: memory when there is no more of it, marks for nsys."""

import gzip
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_train.schema.tracking import Profile, ProfileTool
from hybrid_train.training.hooks.profiling import MarkSteps, SnapshotMemory, TraceSteps

pytestmark = pytest.mark.gpu


def run_at(step: int) -> Any:
    device = torch.device("cuda")
    engine = SimpleNamespace(network=SimpleNamespace(device=device))
    return SimpleNamespace(state=SimpleNamespace(step=step), engine=engine)


def test_memory_is_written_down_when_it_runs_out(tmp_path: Path) -> None:
    hook = SnapshotMemory(Profile(snapshot=True), tmp_path)
    run = run_at(6)
    hook.fit_start(run)
    held = torch.empty(1_000_003, device="cuda", dtype=torch.uint8)
    try:
        torch.empty(1 << 50, device="cuda", dtype=torch.uint8)
    except torch.OutOfMemoryError:
        hook.fit_failed(run)
    hook.fit_end(run)
    with (tmp_path / "memory_step_7_rank_0.pickle").open("rb") as file:
        snapshot = pickle.load(file)
    sizes = [
        block["requested_size"] for segment in snapshot["segments"] for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]  # fmt: skip
    assert held.numel() in sizes


def test_another_fault_writes_no_memory(tmp_path: Path) -> None:
    hook = SnapshotMemory(Profile(snapshot=True), tmp_path)
    hook.fit_start(run_at(0))
    try:
        raise ValueError
    except ValueError:
        hook.fit_failed(run_at(0))
    hook.fit_end(run_at(0))
    assert list(tmp_path.iterdir()) == []


def test_steps_are_marked_between_start_and_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    hook: Any = MarkSteps(Profile(tool=ProfileTool.nsys, start=2, steps=2), tmp_path)
    hook.fit_start(run_at(0))
    for step in range(5):
        hook.step_start(run_at(step))
        hook.step_end(run_at(step + 1), None)
    hook.fit_end(run_at(5))
    assert calls == ["start", "train step 2", "pop", "train step 3", "pop", "stop"]


def test_a_trace_has_the_kernels_of_the_gpu(tmp_path: Path) -> None:
    hook: Any = TraceSteps(Profile(tool=ProfileTool.torch, start=2, steps=1), tmp_path)
    hook.fit_start(run_at(0))
    for step in range(3):
        hook.step_start(run_at(step))
        torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
        hook.step_end(run_at(step + 1), None)
    with gzip.open(tmp_path / "steps_2_to_2_rank_0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any(one.get("cat") == "kernel" for one in events)
