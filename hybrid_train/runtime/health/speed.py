"""Times a GEMM and an all-reduce on every device, in processes of their own.

As a program, one process of the group, it takes a folder where the processes meet, its rank, their
number and "cuda" or "cpu", and leaves what it measured in the folder as RANK.json.
"""

import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid_train.runtime.heartbeat import how_it_ended

CPU_PROCESSES = 2  # the least that have something to tell each other
TIMED_S = 1.0  # of GEMMs, and of reductions
START_S = 120.0  # within which processes have started, met and measured, or are taken for dead
_MEET_S = 60  # within which the slowest has imported torch, on a busy machine too
_MOST_ROUNDS = 200
# Rows and columns of a GEMM, elements of a reduction; large enough that arithmetic and wires,
# not the start of a kernel, are what is timed.
_SIZES = {"cpu": (1024, 8 << 20), "cuda": (8192, 128 << 20)}


@dataclass(frozen=True)
class DeviceSpeed:
    """What one device, or one process of the CPU, did."""

    device: str
    flops: float | None = None  # a second, of GEMMs
    bytes_per_s: float | None = None  # of the bus, in an all-reduce; None for a group of one
    gemm_error: str | None = None
    reduce_error: str | None = None


def measure(kind: str, number: int, threads: int, limit_s: float = START_S) -> list[DeviceSpeed]:
    """Measure all devices at once.

    Args:
        kind: "cuda" or "cpu".
        number: of devices; of processes on a CPU.
        threads: of each process on a CPU.
        limit_s: after which a process is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, folder]
        started = [
            subprocess.Popen(
                [*command, str(rank), str(number), kind, str(threads)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(number)
        ]
        deadline = time.monotonic() + limit_s
        ends = [_end(process, deadline) for process in started]
        return [_read(Path(folder), kind, rank, ends[rank]) for rank in range(number)]


def _end(process: subprocess.Popen[str], deadline: float) -> str:
    """Wait for a process and say how it ended."""
    try:
        _, stderr = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "no answer in time"
    return how_it_ended(process.returncode, stderr)


def _read(folder: Path, kind: str, rank: int, end: str) -> DeviceSpeed:
    file = folder / f"{rank}.json"
    if file.exists():
        return DeviceSpeed(**json.loads(file.read_text()))
    return DeviceSpeed(f"{kind} {rank}", gemm_error=end, reduce_error=end)


def main(folder: str, rank: int, number: int, kind: str, threads: int) -> None:
    """Measure as one process of the group."""
    import torch

    if kind == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(threads)
    size, elements = _SIZES[kind]
    found: dict[str, Any] = {"device": f"{kind} {rank}"}
    found["flops"], found["gemm_error"] = _guarded(lambda: gemm(kind, size))
    found["bytes_per_s"], found["reduce_error"] = _guarded(
        lambda: all_reduce(folder, rank, number, kind, elements)
    )
    whole = json.dumps(asdict(DeviceSpeed(**found)))
    partial = Path(folder) / f"{rank}.part"
    partial.write_text(whole)
    partial.rename(Path(folder) / f"{rank}.json")


def _guarded(measured: Callable[[], float | None]) -> tuple[float | None, str | None]:
    """Return a figure, or the error that was in its way."""
    try:
        return measured(), None
    except Exception as error:  # any: what a broken device raises is not known
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def gemm(kind: str, size: int) -> float:
    """Time GEMMs of square matrices; the best of those that fit into the time.

    Raises:
        ArithmeticError: if a GEMM of matrices of ones does not give their width.
    """
    import torch

    numbers = torch.bfloat16 if kind == "cuda" else torch.float32
    ones = torch.ones(size, size, dtype=numbers, device=kind)
    # A power of two, so every format holds it.
    if not bool(((ones @ ones) == size).all()):
        raise ArithmeticError(f"a GEMM of matrices of ones gives other numbers than {size}")
    a, b = (torch.randn(size, size, device=kind).to(numbers) for _ in range(2))
    best = float("inf")
    end = time.perf_counter() + TIMED_S
    while time.perf_counter() < end:
        best = min(best, _timed(lambda: a @ b, kind))
    return 2 * size**3 / best


def all_reduce(folder: str, rank: int, number: int, kind: str, elements: int) -> float | None:
    """Time sums over all processes: bytes a second on the bus; None for a process alone.

    The bus carries 2 (n - 1) / n of the buffer for each process, whatever the algorithm (NVIDIA's
    nccl-tests, doc/PERFORMANCE.md).

    Raises:
        ArithmeticError: if the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=number,
        timeout=datetime.timedelta(seconds=_MEET_S),
    )
    try:
        ranks = torch.full((elements,), float(rank + 1), device=kind)
        first = _timed(lambda: dist.all_reduce(ranks), kind)
        expected = number * (number + 1) / 2
        if not bool((ranks == expected).all()):
            raise ArithmeticError(f"the sum over {number} processes is not {expected:g} everywhere")
        if number == 1:
            return None
        slowest = torch.tensor([first], device=kind)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)  # so that all do as many rounds
        rounds = min(_MOST_ROUNDS, 2 + int(TIMED_S / slowest.item()))
        best = min(_timed(lambda: dist.all_reduce(ranks), kind) for _ in range(rounds))
        return 4 * elements / best * 2 * (number - 1) / number
    finally:
        dist.destroy_process_group()


def _timed(work: Callable[[], object], kind: str) -> float:
    """Return the seconds that some work took, on the device too."""
    import torch

    if kind == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
