"""Run a function in several gloo processes on this machine and raise what any of them raises.

The processes are forked from one that has imported Megatron already: starting each from nothing
would take longer than the tests.
"""

import atexit
import contextlib
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

COLLECTIVE_TIMEOUT_S = 120  # a rank that waits longer than this for another has lost it
FUNCTION_TIMEOUT_S = 400
_FORKED = get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.distributed.preloaded"])


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
    return _POOL.run(function, num_processes, args)


@dataclass
class _Pool:
    """Processes that wait for functions; their outcomes arrive in one queue, in causal order.

    They meet in a store that this process serves: a port that was looked up and freed again could
    be somebody else's by the time a rank binds it.
    """

    processes: list[BaseProcess] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)
    outcomes: Any = None
    store: Any = None
    runs: int = 0

    def run(self, function: Callable[..., Any], size: int, args: tuple[Any, ...]) -> list[Any]:
        self._grow(size)
        self.runs += 1
        for rank, pipe in enumerate(self.pipes[:size]):
            pipe.send((function, rank, size, (self.store.port, str(self.runs)), args))
        try:
            return self._wait(size)
        finally:
            # What Megatron registers with autograd holds engine and groups for good, and the
            # threads of a group take time even when nothing goes on.
            self.end()

    def _wait(self, size: int) -> list[Any]:
        deadline = time.monotonic() + FUNCTION_TIMEOUT_S
        dead = [process.sentinel for process in self.processes[:size]]
        values: dict[int, Any] = {}
        while len(values) < size:
            ready = connection.wait([self.outcomes._reader, *dead], deadline - time.monotonic())
            if self.outcomes._reader in ready:  # first: what a rank says before it dies
                rank, failure, value = self.outcomes.get()
                if failure is not None:
                    raise RankFailedError(failure)
                values[rank] = value
            elif ready:
                codes = [process.exitcode for process in self.processes[:size]]
                raise RankFailedError(f"a rank died without an exception; exit codes {codes}")
            else:
                waiting = sorted(set(range(size)) - set(values))
                raise RankFailedError(f"ranks {waiting} not done after {FUNCTION_TIMEOUT_S} s")
        return [values[rank] for rank in range(size)]

    def _grow(self, size: int) -> None:
        if self.outcomes is None:
            from torch.distributed import TCPStore

            self.outcomes = _FORKED.SimpleQueue()
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        while len(self.processes) < size:
            here, there = _FORKED.Pipe()
            process = _FORKED.Process(target=_serve, args=(there, self.outcomes), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.pipes, self.outcomes, self.store = [], [], None, None


_POOL = _Pool()
atexit.register(_POOL.end)


def _serve(pipe: Connection, outcomes: Any) -> None:
    """Run one function after the other until the parent is gone."""
    with contextlib.suppress(EOFError):
        while True:
            function, rank, size, meeting, args = pipe.recv()
            try:
                value = _run_rank(function, rank, size, meeting, args)
            except BaseException:
                failure = f"rank {rank}:\n{traceback.format_exc()[-30_000:]}"
                outcomes.put((rank, failure, None))
                time.sleep(COLLECTIVE_TIMEOUT_S)  # connections stay open: no rank fails of this one
            else:
                outcomes.put((rank, None, value))


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    meeting: tuple[int, str],  # port and prefix of the store
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
    port, prefix = meeting
    store = dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", port, timeout=timeout))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    value = function(*args)
    dist.barrier()
    dist.destroy_process_group()
    return value
