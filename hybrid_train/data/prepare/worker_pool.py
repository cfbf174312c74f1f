"""Processes that work on blocks: results come back in the order of the blocks.

By hand since concurrent.futures, which keeps the order and the memory too, took 3 to 11 % more
processor time for the same files (wanted: at most 3 %; `tests/benchmarks/by_library.py workers`,
docs/measured.md), does not say by which signal a worker ended, which is how one that lacked memory
is known, and leaves its workers behind when the main process is killed.

Each worker has a pipe of its own, so that it ends as soon as the main process is gone, killed or
not, and so that the main process notices the end of a worker.
"""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from hybrid_train.schema.problems import UserError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_AHEAD = 2  # blocks that a worker has, so that it never waits for the next
_KEPT = 4  # blocks a worker that may be out or wait for their turn; bounds the memory
_END_S = 5.0  # that an idle worker gets to end
# An allocator that gives memory back after each document asks for it again at the next.
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "268435456", "MALLOC_MMAP_THRESHOLD_": "268435456"}
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **_ALLOCATOR}


@dataclass(frozen=True)
class _Failure:
    """What a worker raised."""

    message: str
    is_users: bool


class WorkerPool[Task, Result]:
    """Some processes that apply one function; a context, at whose end they are gone.

    Args:
        prepare: called once in each process; returns the function. Must be importable.
        facts: its argument.
        workers: number of processes.
    """

    def __init__(
        self, prepare: Callable[[Any], Callable[[Task], Result]], facts: object, workers: int
    ) -> None:
        self._prepare = prepare
        self._facts = facts
        self._workers = workers
        self._processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> "WorkerPool[Task, Result]":
        context = multiprocessing.get_context("spawn")
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)
        try:
            for number in range(self._workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, self._prepare, self._facts),
                    name=f"tokenize-{number}", daemon=True,
                )  # fmt: skip
                process.start()
                theirs.close()  # so that our end hears of the end of theirs
                self._processes[ours] = process
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return self

    def __exit__(self, *_: object) -> None:
        for ours in self._processes:
            ours.close()
        for process in self._processes.values():
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes = {}

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, in the order of the tasks.

        Raises:
            UserError: as the function did, or if a process is gone.
            RuntimeError: if the function failed otherwise; has its traceback.
        """
        numbered = enumerate(tasks)
        busy = dict.fromkeys(self._processes, 0)
        pending: dict[int, Task] = {}
        done: dict[int, Any] = {}
        following, more = 0, True
        while more or pending:
            while more and len(pending) < _KEPT * self._workers and min(busy.values()) < _AHEAD:
                task = next(numbered, None)
                if task is None:
                    more = False
                    break
                pending[task[0]] = task[1]
                idlest = min(busy, key=lambda one: busy[one])
                self._send(idlest, task)
                busy[idlest] += 1
            while following in done:
                result = done.pop(following)
                if isinstance(result, _Failure):
                    raise (UserError if result.is_users else RuntimeError)(result.message)
                yield pending.pop(following), result
                following += 1
            if pending and following not in done:
                for ours in wait([one for one, count in busy.items() if count]):
                    assert isinstance(ours, Connection)
                    number, result = self._receive(ours)
                    done[number] = result
                    busy[ours] -= 1

    def _send(self, ours: Connection, task: object) -> None:
        try:
            ours.send(task)
        except OSError as error:
            raise self._gone(ours) from error

    def _receive(self, ours: Connection) -> tuple[int, Any]:
        try:
            number, result = ours.recv()
        except (EOFError, OSError) as error:
            raise self._gone(ours) from error
        return number, result

    def _gone(self, ours: Connection) -> UserError:
        process = self._processes[ours]
        process.join(_END_S)
        code = process.exitcode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended ({code})"
        hint = "; the system may lack memory: take fewer workers" if code == -signal.SIGKILL else ""
        return UserError(
            f"a worker {how}{hint}. The same command goes on from the last saved position"
        )


def _work(
    theirs: Connection, prepare: Callable[[Any], Callable[[Any], object]], facts: object
) -> None:
    """Do tasks until the main process closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process decides
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Tasks are taken from the pipe at any time: else both ends could wait to send.
    threading.Thread(target=_listen, args=(theirs, tasks), daemon=True).start()
    do: Callable[[Any], object] | None = None
    with suppress(BrokenPipeError, ConnectionResetError):
        while (task := tasks.get()) is not None:
            number, content = task
            result: object
            try:
                do = do or prepare(facts)
                result = do(content)
            except UserError as error:
                result = _Failure(str(error), is_users=True)
            except OSError as error:
                result = _Failure(f"cannot read the input: {error}", is_users=True)
            except MemoryError:
                message = "no memory is left; take fewer workers. The same command goes on"
                result = _Failure(message, is_users=True)
            except Exception:
                result = _Failure(traceback.format_exc(), is_users=False)
            theirs.send((number, result))


def _listen(theirs: Connection, tasks: "queue.SimpleQueue[Any]") -> None:
    try:
        while True:
            tasks.put(theirs.recv())
    except (EOFError, OSError):
        tasks.put(None)
