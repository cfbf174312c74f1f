"""Traces some steps of a run, and writes down who holds memory when a GPU has no more of it."""

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from hybrid_train.runtime import ranks
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.tracking import (
    PROFILE_FOLDER,
    TRACE_VIEWER,
    Profile,
    ProfileTool,
)
from hybrid_train.training.engine import StepReport
from hybrid_train.training.loop import Hook, Run

_log = logging.getLogger(__name__)


def profiling_hooks(settings: Profile, run_dir: Path) -> list[Hook]:
    """List the hooks that the section asks of this process."""
    hooks: list[Hook] = []
    if settings.tool is not ProfileTool.none and ranks.rank() in settings.ranks:
        tool = TraceSteps if settings.tool is ProfileTool.torch else MarkSteps
        hooks.append(tool(settings, run_dir / PROFILE_FOLDER))
    if settings.snapshot:
        hooks.append(SnapshotMemory(settings, run_dir / PROFILE_FOLDER))
    return hooks


class _SomeSteps(Hook):
    """Knows which steps are looked at."""

    def __init__(self, settings: Profile, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._first = settings.start
        self._last = settings.start + settings.steps - 1
        self._at_work = False

    def fit_start(self, run: Run) -> None:
        if run.state.step >= self._last:
            _log.warning(
                "profile: steps %d to %d are over; the run goes on at step %d. profile.start=%d",
                *(self._first, self._last, run.state.step + 1, run.state.step + 2),
            )
        elif run.state.step >= self._first:
            _log.warning("profile: from step %d on", run.state.step + 1)

    def _is_traced(self, step: int) -> bool:
        return self._first <= step <= self._last


class TraceSteps(_SomeSteps):
    """Lets torch.profiler write a trace with a range "train step N" for each traced step.

    The step before the first is traced too and thrown away: starting the profiler takes time that
    would look like that of the run.
    """

    def __init__(self, settings: Profile, folder: Path) -> None:
        super().__init__(settings, folder)
        self._profiler: Any = None
        self._range: Any = None

    def step_start(self, run: Run) -> None:
        step = run.state.step + 1
        if self._profiler is None and (self._is_traced(step) or step == self._first - 1):
            self._profiler = self._start(warm_up=not self._is_traced(step), steps=self._last - step)
        if self._profiler is not None:
            self._range = torch.profiler.record_function(f"train step {step}")
            self._range.__enter__()

    def step_end(self, run: Run, report: StepReport) -> None:
        if self._profiler is None:
            return
        self._range.__exit__(None, None, None)
        self._profiler.step()
        if run.state.step >= self._last:
            self._write(run.state.step)

    def _start(self, *, warm_up: bool, steps: int) -> Any:
        """Start the profiler for this step and `steps` more."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # One active step more than are traced, so that `_write` ends it and not the schedule.
        schedule = torch.profiler.schedule(
            wait=0, warmup=int(warm_up), active=steps + 2 - int(warm_up), repeat=1
        )
        profiler = torch.profiler.profile(
            activities=activities,
            acc_events=True,
            schedule=schedule,
            record_shapes=self._settings.shapes,
            with_stack=self._settings.stacks,
            profile_memory=self._settings.memory,
        )
        profiler.start()
        return profiler

    def _write(self, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self._first}_to_{step}_rank_{ranks.rank()}.json.gz"
        profiler.export_chrome_trace(str(self._folder / name))
        _log.info("profile: %s; open it at %s", self._folder / name, TRACE_VIEWER)

    def fit_end(self, run: Run) -> None:
        if self._profiler is not None:  # the run is shorter than what was to be traced
            self._write(run.state.step)

    def fit_failed(self, run: Run) -> None:
        if self._profiler is not None:
            with contextlib.suppress(Exception):  # what ended the run is worth more than a trace
                self._write(run.state.step)


class MarkSteps(_SomeSteps):
    """Tells Nsight Systems where to begin and to end, and names the steps (NVTX)."""

    def fit_start(self, run: Run) -> None:
        super().fit_start(run)
        if not torch.cuda.is_available():
            error = UserError(
                "profile.tool=nsys marks steps for Nsight Systems on a GPU, and torch sees none; "
                "profile=torch traces a CPU too"
            )
            error.on_all_ranks = True
            raise error

    def step_start(self, run: Run) -> None:
        step = run.state.step + 1
        if not self._is_traced(step):
            return
        if not self._at_work:
            self._at_work = True
            torch.cuda.synchronize()  # what the step before asked for is not of this one
            torch.cuda.profiler.start()
        torch.cuda.nvtx.range_push(f"train step {step}")

    def step_end(self, run: Run, report: StepReport) -> None:
        if not self._at_work:
            return
        torch.cuda.nvtx.range_pop()
        if run.state.step >= self._last:
            self._stop()

    def fit_end(self, run: Run) -> None:
        if self._at_work:
            self._stop()

    def fit_failed(self, run: Run) -> None:
        if self._at_work:
            with contextlib.suppress(Exception):
                self._stop()

    def _stop(self) -> None:
        self._at_work = False
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


class SnapshotMemory(Hook):
    """Records allocations of the GPU; when there is no memory left, writes who holds it.

    pytorch.org/memory_viz shows the file. A CPU has no such record, which is said.
    """

    def __init__(self, settings: Profile, folder: Path) -> None:
        self._events = settings.snapshot_events
        self._folder = folder
        self._records = False

    def fit_start(self, run: Run) -> None:
        self._records = run.engine.network.device.type == "cuda"
        if self._records:
            torch.cuda.memory._record_memory_history(max_entries=self._events)
        else:
            _log.warning("profile.snapshot: there is no record of memory on a CPU; none is made")

    def fit_end(self, run: Run) -> None:
        if self._records:
            torch.cuda.memory._record_memory_history(enabled=None)

    def fit_failed(self, run: Run) -> None:
        if self._records and isinstance(sys.exception(), torch.OutOfMemoryError):
            path = self._folder / f"memory_step_{run.state.step + 1}_rank_{ranks.rank()}.pickle"
            with contextlib.suppress(Exception):  # what ended the run is worth more than this
                self._folder.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(path))
                _log.error("out of memory; who holds it: %s (pytorch.org/memory_viz)", path)
