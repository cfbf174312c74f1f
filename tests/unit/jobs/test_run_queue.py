"""Commands run as many at once as is asked, each into its log, and end together on a signal."""

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

from hybrid_train.jobs.study import Command, run_queue

Ended = list[tuple[int, int]]


def command(folder: Path, name: str, code: str) -> Command:
    lines = f"import os, pathlib, signal, sys, time\nfolder = pathlib.Path({str(folder)!r})\n{code}"
    return Command([sys.executable, "-c", lines], folder / "logs" / f"{name}.log")


def run(commands: list[Command], at_once: int) -> tuple[signal.Signals | None, Ended]:
    ended: Ended = []
    stopped = run_queue(commands, at_once, 3, lambda number, code, _: ended.append((number, code)))
    return stopped, ended


def test_one_at_a_time_is_one_after_the_other(tmp_path: Path) -> None:
    code = (
        "with (folder / 'order').open('a') as file: file.write('start ')\n"
        "time.sleep(0.1)\n"
        "with (folder / 'order').open('a') as file: file.write('end ')"
    )
    stopped, ended = run([command(tmp_path, str(n), code) for n in range(3)], 1)
    assert (tmp_path / "order").read_text() == "start end " * 3
    assert (stopped, ended) == (None, [(0, 0), (1, 0), (2, 0)])


def test_two_at_once_can_wait_for_each_other(tmp_path: Path) -> None:
    def meet(mine: str, other: str) -> str:
        return (
            f"(folder / {mine!r}).touch()\n"
            f"while not (folder / {other!r}).exists(): time.sleep(0.01)"
        )

    commands = [command(tmp_path, "a", meet("a", "b")), command(tmp_path, "b", meet("b", "a"))]
    _, ended = run(commands, 2)
    assert sorted(ended) == [(0, 0), (1, 0)]


def test_a_command_of_two_processes_waits_for_both_places_and_none_overtakes_it(
    tmp_path: Path,
) -> None:
    def noted(name: str) -> Command:
        code = (
            f"(folder / 'order').open('a').write('start {name} ')\n"
            "time.sleep(0.3)\n"
            f"(folder / 'order').open('a').write('end {name} ')"
        )
        return command(tmp_path, name, code)

    commands = [noted("a"), dataclasses.replace(noted("b"), processes=2), noted("c")]
    _, ended = run(commands, 2)
    assert (tmp_path / "order").read_text() == "start a end a start b end b start c end c "
    assert [number for number, _ in ended] == [0, 1, 2]
    _, ended = run([dataclasses.replace(noted("d"), processes=9)], 2)  # more than there are places
    assert ended == [(0, 0)]


def test_a_command_that_fails_stops_no_other_and_its_words_are_in_its_log(tmp_path: Path) -> None:
    commands = [
        command(tmp_path, "bad", "sys.exit('it broke')"),
        command(tmp_path, "good", "print(os.environ['OMP_NUM_THREADS'], flush=True)"),
    ]
    _, ended = run(commands, 1)
    assert ended == [(0, 1), (1, 0)]
    assert commands[0].log.read_text() == "it broke\n"
    assert commands[1].log.read_text() == "3\n"


def test_a_command_starts_behind_those_it_waits_for_and_not_behind_a_failure(
    tmp_path: Path,
) -> None:
    def waits(name: str, code: str, *after: int) -> Command:
        return dataclasses.replace(command(tmp_path, name, code), after=after)

    commands = [
        waits("child", "assert (folder / 'made').exists()", 1),
        waits("parent", "time.sleep(0.1); (folder / 'made').touch()"),
        waits("bad", "sys.exit(1)"),
        waits("orphan", "(folder / 'orphan').touch()", 2),
        waits("grandchild", "(folder / 'orphan').touch()", 3),
    ]
    stopped, ended = run(commands, 2)
    assert stopped is None
    assert sorted(ended) == [(0, 0), (1, 0), (2, 1)]
    assert not (tmp_path / "orphan").exists()


def test_a_signal_is_passed_on_and_nothing_starts_after_it(tmp_path: Path) -> None:
    patient = (
        "def save(*_):\n    (folder / 'saved').touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(folder / 'ready').touch()\n"
        "time.sleep(60)"
    )
    commands = [
        command(tmp_path, "first", patient),
        command(tmp_path, "second", "(folder / 'second').touch()"),
    ]

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    stopped, ended = run(commands, 1)
    assert (stopped, ended) == (signal.SIGINT, [])
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "second").exists()
