"""Run a function in several gloo processes on this machine and raise what any of them raises."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.multiprocessing.queue import SimpleQueue

TIMEOUT_S = 120  # a rank that waits longer than this for another has lost it


def run_distributed(function: Callable[..., None], num_processes: int, *args: Any) -> None:
    """Call `function(*args)` on every rank of a fresh gloo group and wait for all of them.

    Args:
        function: importable by name (a module-level function); it checks its results itself.
        num_processes: size of the group.
        *args: passed to every rank; must be picklable.

    Raises:
        RankFailedError: with the traceback of the first rank to fail; the other ranks are ended.
        torch.multiprocessing.ProcessExitedException: if a rank dies without an exception.
    """
    failures: SimpleQueue[str] = multiprocessing.get_context("spawn").SimpleQueue()
    ranks = (num_processes, _free_port(), failures, function, args)
    try:
        multiprocessing.spawn(_run_rank, args=ranks, nprocs=num_processes)
    except multiprocessing.ProcessRaisedException:
        # torch raises what it meets first, often the broken connection of a rank that was waiting.
        raise RankFailedError(failures.get()) from None


class RankFailedError(Exception):
    """A rank of the group raised; the message is its traceback."""


def _run_rank(
    rank: int,
    num_processes: int,
    port: int,
    failures: "SimpleQueue[str]",
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)  # the ranks share the cores of one machine
    # As torchrun sets them, so that the tested code finds what it finds there.
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_processes),
        LOCAL_WORLD_SIZE=str(num_processes),
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    try:
        function(*args)
        dist.barrier()
    except Exception:
        # Before this rank's connections close: what the others then raise queues up behind it.
        failures.put(f"rank {rank}:\n{traceback.format_exc()[-30_000:]}")
        raise
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
