"""Stands for the Python process that a test starts: hands its words over and ends as it does.

    python -IS client.py SOCKET NAME WORDS...

NAME is what this Python is called by, WORDS are its arguments. The server forks a process that gets
the arguments, the environment, the folder, the mask of new files and every open file of this one;
this one passes signals on and has the exit code, or the death by a signal, of the other. If it is
killed, so is the other. It imports nothing but small modules: it starts in hundredths of a second.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys

PASSED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")


class Signals:
    """Signals that come from now on go to a process as soon as there is one."""

    def __init__(self) -> None:
        self._early: list[int] = []
        self._process: int | None = None
        # Ignored ones, too (nohup, a job in the background): the other may have a use for them.
        numbers = (getattr(signal, name) for name in PASSED_ON)
        self._before = {number: signal.signal(number, self._received) for number in numbers}

    def _received(self, number: int, _: object) -> None:
        if self._process is None:
            self._early.append(number)
            return
        with contextlib.suppress(ProcessLookupError):  # it ended; the server is about to say how
            os.kill(self._process, number)

    def pass_on_to(self, process: int) -> None:
        self._process = process
        self._again()

    def give_back(self) -> None:
        """Let this process have them again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._process = os.getpid()
        self._again()

    def _again(self) -> None:
        while self._early:
            self._received(self._early.pop(0), None)


def main() -> None:
    address, name, *words = sys.argv[1:]
    files, signals = open_files(), Signals()
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(address)
        ask(server, name, words, files)
        answers = server.makefile()
        answer = json.loads(answers.readline() or "{}")
    except OSError as error:
        answer = {"gone": str(error)}
    if "cold" in answer:
        server.close()
        signals.give_back()
        os.execv(sys.executable, [sys.executable, *words])
    if "refused" in answer:
        sys.exit(f"a fork is not what Python would be here; start it cold. {answer['refused']}")
    if "process" not in answer:
        sys.exit(f"the server of {address} is gone: see server.log beside it. {answer}")
    signals.pass_on_to(answer["process"])
    end_alike(json.loads(answers.readline() or "{}").get("code", -signal.SIGKILL))


def open_files() -> list[int]:
    """Return the descriptors that this process was started with."""
    found = []
    for number in map(int, os.listdir("/dev/fd")):
        try:
            os.fstat(number)
        except OSError:  # that of the folder itself
            continue
        found.append(number)
    return found


def ask(server: socket.socket, name: str, words: list[str], files: list[int]) -> None:
    """Send what makes up the process; the length of it goes ahead, with the open files."""
    mask = os.umask(0)
    os.umask(mask)
    request = {
        "name": name,
        "words": words,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "mask": mask,
        "files": files,
    }
    content = json.dumps(request).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "big")], files)
    server.sendall(content)


def end_alike(code: int) -> None:
    """End with an exit code, or by the signal of a negative one."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
