"""A process that has imported torch, Megatron and hybrid_train: each command line is a fork of it.

The child becomes what `python WORDS` would be: its own session, arguments, environment, folder,
open files, standard streams, `__main__`; it ends as Python ends, but for `leave`. What it cannot
become is started anew by the client: options of Python other than -u, anything beside a GPU. Where
the environment differs in what is read at import, the command fails with the names: the test has to
ask for a cold start.

Not handed over: limits (`ulimit`), priorities, ignored signals. The hash of strings is that of the
server, in every child.
"""

import atexit
import fcntl
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Variables that Python, torch and others read when they are loaded. OMP_NUM_THREADS is not among
# them, since the child can still do what torch does with it.
AT_IMPORT = (
    *("PYTHON", "LD_", "LC_", "LANG", "TORCH", "CUDA", "NVIDIA", "TRITON"),
    *("MKL", "KMP_", "GOMP_", "OPENBLAS_", "MALLOC_", "MPL"),
)
# Read where they are used: what torchrun sets, and what torch._dynamo sets in a test. The last two
# scikit-learn sets when a test imports lm-eval; torch's OpenMP, which is GNU's, does not read them.
AT_CALL = (
    *("TORCHELASTIC_", "TORCH_NCCL_", "TORCHINDUCTOR_"),
    *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),
)
THREADS = "OMP_NUM_THREADS"
AT_START = dict(os.environ)  # an import may set more: torch._dynamo does
HIGH = 500  # descriptors above those that a command is given
MOST_FILES = 200  # that one message takes; Linux allows 253


@dataclass(frozen=True)
class Request:
    """What a process is to become."""

    name: str  # of the Python, for sys.executable
    words: list[str]
    environment: dict[str, str]
    folder: str
    mask: int
    files: list[int]  # numbers that the received ones must have
    received: list[int]

    @property
    def unbuffered(self) -> bool:
        return self.words[:1] == ["-u"] or bool(AT_START.get("PYTHONUNBUFFERED"))

    @property
    def program(self) -> list[str]:
        """The words after options: -m MODULE, -c CODE or a file, and arguments."""
        return self.words[1:] if self.words[:1] == ["-u"] else self.words

    def is_plain(self) -> bool:
        """Tell whether it asks for a program without options of Python."""
        first = self.program[0] if self.program else "-"
        return not first.startswith("-") or (first in ("-m", "-c") and len(self.program) > 1)

    def refusal(self) -> str | None:
        """Say how the environment makes a fork other than a fresh Python; None if it does not."""
        mine, theirs = at_import(AT_START), at_import(self.environment)
        different = [name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)]
        if different:
            return f"{', '.join(sorted(different))}: read at import"
        threads = self.environment.get(THREADS)
        if threads != AT_START.get(THREADS) and not (threads or "").isdecimal():
            return f"{THREADS}={threads}: read at import, and no number to set in its place"
        return None


def at_import(environment: dict[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(AT_IMPORT) and not name.startswith(AT_CALL)
    }


class Server:
    """Forks a process for each request and tells its client how it ended."""

    def __init__(self, listener: socket.socket, forks: bool) -> None:
        self._listener = listener
        self._forks = forks  # whether it may
        self._clients: dict[int, socket.socket | None] = {}  # None: gone, as its process will be
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def serve(self) -> Request | None:
        """Return a request in the process that is to become it, None when stdin has ended."""
        while True:
            clients = {client: child for child, client in self._clients.items() if client}
            ready, _, _ = select.select([0, self._listener, self._woken, *clients], [], [])
            for one in ready:
                if one == 0:
                    for child in self._clients:
                        os.kill(child, signal.SIGKILL)
                    return None
                if one is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif one is self._woken:
                    self._woken.recv(4096)
                    self._reap()
                elif self._clients.get(clients[one]) is one:  # it says nothing: it is gone
                    self._clients[clients[one]] = None
                    one.close()
                    os.kill(clients[one], signal.SIGKILL)

    def _accept(self) -> Request | None:
        client, _ = self._listener.accept()
        request = receive(client)
        if request is None:
            client.close()
            return None
        if not self._forks or not request.is_plain():
            answer: dict[str, object] = {"cold": True}
        elif refusal := request.refusal():
            answer = {"refused": refusal}
        else:
            child = os.fork()
            if child == 0:
                self._leave(client)
                return request
            self._clients[child] = client
            answer = {"process": child}
        for number in request.received:
            os.close(number)
        say(client, **answer)
        if "process" not in answer:
            client.close()
        return None

    def _leave(self, client: socket.socket) -> None:
        """Close in a child what belongs to the server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        others = (one for one in self._clients.values() if one)
        for one in (client, *others, self._listener, self._woken, self._waker):
            one.close()

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                child, status = os.waitpid(-1, os.WNOHANG)
                if child == 0:
                    return
                client = self._clients.pop(child, None)
                if client:
                    say(client, code=os.waitstatus_to_exitcode(status))
                    client.close()


def say(client: socket.socket, **answer: object) -> None:
    with suppress(OSError):  # it is gone; `serve` will see that
        client.sendall(json.dumps(answer).encode() + b"\n")


def receive(client: socket.socket) -> Request | None:
    """Read a request, None if the client is gone."""
    length, received, _, _ = socket.recv_fds(client, 8, MOST_FILES)
    with client.makefile("rb") as file:
        content = file.read(int.from_bytes(length, "big"))
    if len(length) < 8 or len(content) < int.from_bytes(length, "big"):
        for number in received:
            os.close(number)
        return None
    return Request(**json.loads(content), received=list(received))


def become(request: Request) -> None:
    """Take over all that a process is started with."""
    os.setsid()
    take_files(request)
    os.umask(request.mask)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    if request.environment.get(THREADS) != AT_START.get(THREADS):
        # As torch does at its import, with the cores as the upper bound of MKL.
        threads = min(int(request.environment[THREADS]), os.cpu_count() or 1)
        sys.modules["torch"].set_num_threads(threads)
    for generator in (sys.modules["numpy"].random, sys.modules["torch"].default_generator):
        generator.seed()  # by chance, as an import does
    sys.executable = request.name
    sys.orig_argv = [request.name, *request.words]
    open_streams(request.unbuffered)


def take_files(request: Request) -> None:
    """Give the received files the numbers that they have in the client."""
    high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, HIGH) for number in request.received]
    for number in request.received:
        os.close(number)
    for source, number in zip(high, request.files, strict=True):
        os.dup2(source, number)
        os.close(source)


def open_streams(unbuffered: bool) -> None:
    """Open stdin, stdout and stderr as Python does when it starts."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        there = getattr(sys, name)
        mode = "r" if number == 0 else "w"
        raw = unbuffered and number > 0
        binary = open(number, f"{mode}b", buffering=0 if raw else -1, closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(
            binary,
            encoding=there.encoding,
            errors=there.errors,
            line_buffering=not unbuffered and (number == 2 or os.isatty(number)),
            write_through=raw,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run(program: list[str]) -> None:
    """Run `python PROGRAM` as `__main__`, as Python itself does."""
    kind, rest = program[0], program[1:]
    main: dict[str, Any] = vars(sys.modules["__main__"])
    if kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        sys.path[0] = os.getcwd()
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        return
    main.update(__name__="__main__", __spec__=None, __package__=None, __doc__=None)
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.argv = program
        sys.path[0] = os.path.dirname(os.path.realpath(kind))
        main.update(__file__=os.path.abspath(kind), __cached__=None)
        code = compile(Path(kind).read_bytes(), kind, "exec")
    exec(code, main)


def leave(code: int) -> None:
    """End as Python does, but leave the taking apart of every module and object to the system.

    That takes 1.5 s after a run. An end by an exception goes the whole way, but Ctrl-C: Python
    forgets it when what runs at its exit evaluates a string (as a named tuple does).

    Args:
        code: exit status; below zero the signal to end by.
    """
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # Python has words and a code for it
        sys.exit(code)
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def preload() -> bool:
    """Import what commands import; return whether a fork has all that it needs.

    CUDA does not survive a fork.

    Raises:
        RuntimeError: if an import has started a thread, which a fork would lose.
    """
    import torch

    if torch.cuda.is_available():
        return False
    from hybrid_train.runtime import cpu

    cpu.install()
    for module in PRELOADED:
        importlib.import_module(module)
    sys.modules["hybrid_train.config.registry"].register("train")  # once for all runs
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        raise RuntimeError("an import has started a thread, and a fork would lose it")
    return True


# What a run imports by its end. Programs that are run with -m are not among them: Python warns of
# one that is imported already.
PRELOADED = (
    "multiprocessing.spawn",  # before sys.executable changes: what it starts is a fresh Python
    "torch.distributed.launcher.api",
    "torch.distributed.argparse_util",
    "torch._dynamo",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "hybrid_train.config.compose",
    "hybrid_train.config.describe",
    "hybrid_train.jobs.cli",
    "hybrid_train.jobs.pretraining",
)


def main(listening: int) -> None:
    """Serve, and in each child be what was asked for."""
    forks = preload()
    gc.collect()
    gc.freeze()  # the garbage collector of a child would copy every page
    request = Server(socket.socket(fileno=listening), forks).serve()
    if request is not None:
        become(request)
        code = 0
        try:
            run(request.program)
        except SystemExit as end:
            if not isinstance(end.code, int | None):
                raise
            code = end.code or 0
        except KeyboardInterrupt:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            code = -signal.SIGINT
        leave(code)
