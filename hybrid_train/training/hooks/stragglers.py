"""Tells which processes are slower than the others, and in which part of the step."""

import logging
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hybrid_train.runtime import progress, ranks
from hybrid_train.schema.recovery import Recovery
from hybrid_train.tracking import history
from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport

# Each process does these for itself, so their time is its own. What waits for others is left out.
_PARTS = (progress.DATA, progress.FORWARD_BACKWARD, progress.OPTIMIZER)
_PROBE = "matrix product"  # the same work on every process: a slow device shows under any layout
_PROBE_OF = {"cpu": (256, torch.float32), "cuda": (4096, torch.bfloat16)}
_LEAST_S = 0.002  # a step; below that, clocks and schedulers make the difference
_log = logging.getLogger(__name__)


class CompareProcesses(Hook):
    """Compares the mean times since the last comparison."""

    def __init__(self, settings: Recovery, run_dir: Path) -> None:
        self._interval, self._ratio = settings.straggler_interval, settings.straggler_ratio
        self._run_dir = run_dir
        self._steps = 0

    def fit_start(self, run: Run) -> None:
        progress.take_seconds()  # what building the model took is no part of a step

    def step_end(self, run: Run, report: StepReport) -> None:
        self._steps += 1
        if run.state.step % self._interval:
            return
        taken, steps = progress.take_seconds(), self._steps
        self._steps = 0
        mine = [taken.get(part, 0.0) / steps for part in _PARTS]
        mine.append(_probe(run.engine.network.device))
        times = torch.tensor(mine, device=run.engine.network.device)
        everyone = [torch.empty_like(times) for _ in range(ranks.world_size())]
        dist.all_gather(everyone, times)
        slow = stragglers([one.tolist() for one in everyone], self._ratio)
        if slow and ranks.is_main():
            for line in slow[:8]:
                _log.warning("slow: %s", line)
            history.note(self._run_dir, "stragglers", step=run.state.step, slow=slow)


def stragglers(times: list[list[float]], ratio: float) -> list[str]:
    """Name the processes whose time is far above the median of all.

    Args:
        times: seconds a step of each process, for each part and the probe.
        ratio: over the median that is told.
    """
    found = []
    for part, column in zip((*_PARTS, _PROBE), zip(*times, strict=True), strict=True):
        usual = statistics.median_low(column)
        found += [
            (
                taken - usual,
                f"rank {rank}, {part}: {taken * 1000:.1f} ms, median {usual * 1000:.1f}",
            )
            for rank, taken in enumerate(column)
            if taken > ratio * usual and taken - usual > _LEAST_S
        ]
    return [line for _, line in sorted(found, reverse=True)]


def _probe(device: torch.device) -> float:
    """Time the same product on every process, the best of three."""
    size, dtype = _PROBE_OF[device.type]
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # until a GPU has done it
        seconds.append(time.perf_counter() - start)
    return min(seconds)
