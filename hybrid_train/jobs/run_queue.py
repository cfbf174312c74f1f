"""Runs commands as processes of their own, several at once, each with a log, until all have ended.

A signal to this process is passed on: every running command may save and end; none is started after
it.
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


@dataclass(frozen=True)
class Command:
    """One process to run: its words, and the file that takes what it says."""

    words: Sequence[str]
    log: Path


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
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    waiting = list(enumerate(commands))[::-1]
    running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
    stop, passed_on = StopSignals(), False
    try:
        while running or (waiting and stop.received is None):
            while waiting and len(running) < at_once and stop.received is None:
                number, command = waiting.pop()
                running[number] = (_start(command, environment), time.monotonic())
            if stop.received is not None and not passed_on:
                passed_on = True
                for process, _ in running.values():
                    process.send_signal(signal.SIGTERM)
            for number, (process, started) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[number]
                    if stop.received is None:
                        ended(number, code, time.monotonic() - started)
            time.sleep(_POLL_S)
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()
        stop.restore()
    return stop.received


def _start(command: Command, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
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
