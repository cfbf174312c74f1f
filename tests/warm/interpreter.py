"""A `python` whose start costs a fork: torch, Megatron and hybrid_train are imported already.

`warm()` is its path, for commands under `environment()`; what such a command starts as
`sys.executable`, as torchrun and a study do, is a fork, too. `server.py` says what a fork is given,
and what is started cold instead.
"""

import atexit
import functools
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
WAITING = 100  # commands that may ask at once
_AT_START = dict(os.environ)  # whatever a test has changed when the first of them needs the server


def environment() -> dict[str, str]:
    """Return variables under which commands use this source tree, with one thread each."""
    return _environment(os.environ)


def _environment(variables: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    return {**variables, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@functools.cache
def warm() -> str:
    """Start a server, which ends with this process; return the path of its `python`.

    A command that comes before the server is ready waits for it.
    """
    folder = Path(tempfile.mkdtemp(prefix="warm_"))  # short: a socket has 107 letters at most
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    python, address = folder / "python", str(folder / "socket")
    client = [sys.executable, "-IS", str(Path(__file__).with_name("client.py")), address]
    python.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$0" "$@"\n')
    python.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener, (folder / "server.log").open("wb") as log:
        listener.bind(address)
        listener.listen(WAITING)
        code = f"from tests.warm import server; server.main({listener.fileno()})"
        server = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,  # its end is the end of the server
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=_environment(_AT_START),
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    atexit.register(_end, server)
    return str(python)


def _end(server: "subprocess.Popen[bytes]") -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
