"""Runs commands as processes of their own, several at once, each with a log, until all have ended.

A command may wait for others; if one of these fails, it is not started. A signal to this process is
passed on: every running command may save and end; none is started after it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_train.runtime.signals import StopSignals

_POLL_S = 0.2
Running = dict[int, tuple["subprocess.Popen[bytes]", float]]  # by number: process, start


@dataclass(frozen=True)
class Command:
    """One process to run.

    Attributes:
        words: of it.
        log: file that takes what it says.
        after: numbers of the commands that must have ended well before it starts.
        threads: of it alone, where nothing can run beside it; None: those of the queue.
    """

    words: Sequence[str]
    log: Path
    after: Sequence[int] = ()
    threads: int | None = None


def run_queue(
    commands: Sequence[Command],
    at_once: int,
    threads: int,
    ended: Callable[[int, int, float], None],
) -> signal.Signals | None:
    """Run commands in their order, at most `at_once` of them at a time.

    Args:
        commands: what to run.
        at_once: processes at a time.
        threads: of each process, by OMP_NUM_THREADS.
        ended: called with the number of a command, its exit code and its seconds as it ends,
            unless a signal has stopped the queue.

    Returns:
        The signal that stopped the queue; None if it came to its end.
    """
    waiting = list(range(len(commands)))
    running: Running = {}
    well: set[int] = set()
    stop, passed_on = StopSignals(), False
    try:
        while running or (waiting and stop.received is None):
            ready = [n for n in waiting if well.issuperset(commands[n].after)]
            for number in ready[: at_once - len(running)] if stop.received is None else ():
                waiting.remove(number)
                running[number] = (_start(commands[number], threads), time.monotonic())
            if not running:
                break  # all that wait, wait for one that failed
            if stop.received is not None and not passed_on:
                passed_on = True
                for process, _ in running.values():
                    process.send_signal(signal.SIGTERM)
            for number, code, seconds in _taken_ended(running):
                if stop.received is None:
                    ended(number, code, seconds)
                if code == 0:
                    well.add(number)
            time.sleep(_POLL_S)
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()
        stop.restore()
    return stop.received


def _taken_ended(running: Running) -> list[tuple[int, int, float]]:
    """Take out what has ended; return number, exit code and seconds of each."""
    found = []
    for number, (process, started) in list(running.items()):
        code = process.poll()
        if code is not None:
            del running[number]
            found.append((number, code, time.monotonic() - started))
    return found


def _start(command: Command, threads: int) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(command.threads or threads)}
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("ab") as log:
        # A session of its own: Ctrl-C on the terminal reaches it through this process alone, once.
        return subprocess.Popen(
            command.words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
