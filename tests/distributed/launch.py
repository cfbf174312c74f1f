"""Run a function in several gloo processes on this machine and raise what any of them raises.

The processes are forked from one that has imported Megatron already: starting each from nothing
would take longer than the tests.
"""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any

COLLECTIVE_TIMEOUT_S = 120  # a rank that waits longer than this for another has lost it
FUNCTION_TIMEOUT_S = 400
FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(["tests.distributed.preloaded"])


class RankFailedError(Exception):
    """A rank of the group failed; the message is the traceback of the first one to do so."""


def run_distributed(function: Callable[..., Any], num_processes: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh gloo group and wait for all of them.

    Args:
        function: importable by name (a module-level function).
        num_processes: size of the group.
        *args: passed to every rank; must be picklable.

    Returns:
        What each rank returned.

    Raises:
        RankFailedError: if a rank raises, dies or takes too long; all processes are ended.
    """
    from torch.distributed import TCPStore

    # A port that was looked up and freed again could be somebody else's when a rank binds it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outcomes = FORKED.SimpleQueue()  # in causal order
    processes = [
        FORKED.Process(
            target=_serve,
            args=(outcomes, function, rank, num_processes, store.port, args),
            daemon=True,
        )
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    try:
        return _wait(processes, outcomes)
    finally:
        # Not used again: what Megatron registers with autograd holds engine and groups for good,
        # and the threads of a group take time even when nothing goes on.
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _wait(processes: list[Any], outcomes: Any) -> list[Any]:
    deadline = time.monotonic() + FUNCTION_TIMEOUT_S
    dead = [process.sentinel for process in processes]
    values: dict[int, Any] = {}
    while len(values) < len(processes):
        ready = connection.wait([outcomes._reader, *dead], deadline - time.monotonic())
        if outcomes._reader in ready:  # first: what a rank says before it dies
            rank, failure, value = outcomes.get()
            if failure is not None:
                raise RankFailedError(failure)
            values[rank] = value
        elif ready:
            codes = [process.exitcode for process in processes]
            raise RankFailedError(f"a rank died without an exception; exit codes {codes}")
        else:
            waiting = sorted(set(range(len(processes))) - set(values))
            raise RankFailedError(f"ranks {waiting} not done after {FUNCTION_TIMEOUT_S} s")
    return [values[rank] for rank in range(len(processes))]


def _serve(
    outcomes: Any,
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    args: tuple[Any, ...],
) -> None:
    """Put what the function returns or raises into the queue; then wait to be ended."""
    try:
        value = _run_rank(function, rank, size, port, args)
    except BaseException:
        outcomes.put((rank, f"rank {rank}:\n{traceback.format_exc()[-30_000:]}", None))
    else:
        outcomes.put((rank, None, value))
    time.sleep(FUNCTION_TIMEOUT_S)  # connections stay open: no rank fails of another's end


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,  # of the store
    args: tuple[Any, ...],
) -> Any:
    from torch import distributed as dist

    # As torchrun sets them, so that the tested code finds what it finds there.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
    )
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store = dist.TCPStore("127.0.0.1", port, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    value = function(*args)
    dist.barrier()
    dist.destroy_process_group()
    return value
