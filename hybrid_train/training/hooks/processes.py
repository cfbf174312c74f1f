"""Hooks over all processes: they stop, collect garbage and capture graphs at the same steps.

They name processes that are slow, and those whose weights are not what others have of them.
"""

import gc
import logging
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hybrid_train.megatron import data_parallel, forward_backward
from hybrid_train.runtime import heartbeat, ranks
from hybrid_train.runtime.heartbeat import SIGNALS, StopSignals
from hybrid_train.schema.checkpoint import Recovery
from hybrid_train.schema.gpu import Gpu
from hybrid_train.schema.problems import UserError
from hybrid_train.tracking import history
from hybrid_train.training.engine import StepReport
from hybrid_train.training.loop import Hook, Run
from hybrid_train.training.network import Network

if TYPE_CHECKING:
    import signal


# Parts of a step that are compared. Each process does these for itself, so their time is its own;
# what waits for others is left out.
_PARTS = (heartbeat.DATA, heartbeat.FORWARD_BACKWARD, heartbeat.OPTIMIZER)
_PROBE = "GEMM"  # the same work on every process: a slow device shows under any layout
_PROBE_OF = {"cpu": (256, torch.float32), "cuda": (4096, torch.bfloat16)}
_SHOWN = 8  # tensors that an error names
_LEAST_S = 0.002  # a step; below that, clocks and schedulers make the difference
_log = logging.getLogger(__name__)


class StopOnSignal(Hook):
    """Stops the run between two steps when any process got a signal, or time is up.

    All processes agree on it, so that all save the same step.
    """

    def __init__(self, time_limit_s: float | None = None) -> None:
        """Listen from now on.

        Args:
            time_limit_s: how long from now; None: for ever. The clock of rank 0 counts.
        """
        self.signal: signal.Signals | None = None
        self._rank = 0  # the last of those that got it
        self._end = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._limit_s, self._time_is_up = time_limit_s, False
        self._signals = StopSignals()

    def fit_start(self, run: Run) -> None:
        self._agree(run)

    def step_end(self, run: Run, report: StepReport) -> None:
        self._agree(run)

    def _agree(self, run: Run) -> None:
        received, rank, world = self._signals.received, dist.get_rank(), dist.get_world_size()
        mine = -1 if received is None else SIGNALS.index(received) * world + rank
        late = rank == 0 and self._end is not None and time.monotonic() > self._end
        told = torch.tensor([mine, late], device=run.engine.network.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        theirs, time_is_up = told.tolist()
        if time_is_up:
            self._time_is_up = run.stop_requested = True
        if theirs >= 0:
            self.signal, self._rank = SIGNALS[theirs // world], theirs % world
            run.stop_requested = True

    def how_it_ended(self) -> tuple[str, str, str, tuple[int, ...]]:
        """Return outcome, kind, cause and ranks for the history of the run."""
        if self.signal is None and self._time_is_up:
            text = f"stopped after a save: recovery.time_limit_s={self._limit_s:g} is over"
            return history.STOPPED, "clock", text, ()
        if self.signal is None:
            return history.FINISHED, "finished", "all tokens are trained", ()
        text = f"stopped by {self.signal.name} on rank {self._rank} after a save"
        return history.STOPPED, "signal", text, (self._rank,)

    def close(self) -> None:
        """Let signals do what they did before; earlier, they would end a process without a word."""
        self._signals.restore()


class CollectGarbage(Hook):
    """Collects garbage at the same steps on all processes, so that none makes the others wait.

    It takes over from Python's own timing while the run lasts.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def fit_start(self, run: Run) -> None:
        gc.collect()
        gc.freeze()  # what was built so far stays until the end
        gc.disable()

    def step_end(self, run: Run, report: StepReport) -> None:
        if run.state.step % self._interval == 0:
            gc.collect()

    def fit_end(self, run: Run) -> None:
        gc.unfreeze()
        gc.enable()


class CaptureGraphs(Hook):
    """Captures the layers of all networks when enough steps have warmed them up.

    A run that goes on warms up anew: a graph is of this process alone. Does nothing where layers
    are not to be captured, as on a CPU.
    """

    def __init__(self, settings: Gpu) -> None:
        self._left = settings.cuda_graph_warmup_steps

    def step_end(self, run: Run, report: StepReport) -> None:
        if self._left == 0:
            return
        self._left -= 1
        if self._left == 0:
            for network in run.engine.networks.values():
                if network.optimizer is not None and forward_backward.captures_layers(
                    network.chunks
                ):
                    self._capture(run, network)

    def _capture(self, run: Run, network: Network) -> None:
        engine = run.engine
        assert network.optimizer is not None
        forward_backward.capture_layers(
            network.chunks,
            network.optimizer,
            network.groups,
            network.balance_losses,
            shape=(engine.microbatch, engine.sequence_length),
            global_batch=engine.sequences_per_step,
        )
        _log.info("CUDA graphs of the layers are captured; steps replay them from here on")


class ReplicaError(UserError):
    """Processes hold other values of a weight that they should hold alike."""

    kind = "corruption"


class CompareReplicas(Hook):
    """Stops the run where processes no longer hold the same weights."""

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def step_end(self, run: Run, report: StepReport) -> None:
        step = run.state.step
        if step % self._interval:
            return
        found = [
            one
            for network in run.engine.networks.values()
            if network.optimizer is not None
            for one in data_parallel.different_replicas(network.chunks, network.groups)
        ]
        told = torch.tensor(len(found), device=run.engine.network.device)
        dist.all_reduce(told)
        if not told.item():
            return
        everywhere: list[list[data_parallel.Difference]] = [[] for _ in range(ranks.world_size())]
        dist.all_gather_object(everywhere, found)
        lines = dict.fromkeys(
            f"  {one.name} of rank {', '.join(map(str, one.ranks))}"
            for each in everywhere
            for one in each
        )
        error = ReplicaError(_words_of(list(lines), step, self._interval))
        error.on_all_ranks = True
        raise error


def _words_of(lines: list[str], step: int, interval: int) -> str:
    shown = "\n".join(lines[:_SHOWN])
    more = f"\n  and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    return (
        f"step {step}: processes that should hold the same weights do not; a device or a kernel "
        f"computes wrongly, or memory lost a bit, in the last {interval} steps:\n{shown}{more}\n"
        "Take the node of that rank out (of two ranks that differ, one is right), and go on from a "
        f"checkpoint of step {max(0, step - interval)} or before; recovery.checksum_interval=0 "
        "goes on without the comparison"
    )


class CompareProcesses(Hook):
    """Tells which processes are slower than the others, by mean times since the last comparison."""

    def __init__(self, settings: Recovery, run_dir: Path) -> None:
        self._interval, self._ratio = settings.straggler_interval, settings.straggler_ratio
        self._run_dir = run_dir
        self._steps = 0

    def fit_start(self, run: Run) -> None:
        heartbeat.take_seconds()  # what building the model took is no part of a step

    def step_end(self, run: Run, report: StepReport) -> None:
        self._steps += 1
        if run.state.step % self._interval:
            return
        taken, steps = heartbeat.take_seconds(), self._steps
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
    """Time the same GEMM on every process, the best of three."""
    size, dtype = _PROBE_OF[device.type]
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = a @ a
        result[0, 0].item()  # until a GPU has done it
        seconds.append(time.perf_counter() - start)
    return min(seconds)
