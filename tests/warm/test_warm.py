"""A fork of the warm process is what a fresh Python is; what it cannot be is started cold."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.warm import interpreter

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="beside a GPU every command is started cold"
)
TIMEOUT_S = 120
# What a shell on the way to Python may add.
OF_A_SHELL = {"_", "SHLVL", "PWD", "OLDPWD"}
PROBE = """\
import json, os, signal, sys

mask = os.umask(0)
os.umask(mask)
main = sys.modules["__main__"]
handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
print(json.dumps({
    "arguments": sys.argv,
    "first of the path": sys.path[0],
    "rest of the path": [path for path in sys.path[1:] if path],
    "folder": os.getcwd(),
    "environment": dict(os.environ),
    "mask": mask,
    "stdin": sys.stdin.read(),
    "streams": [[s.encoding, s.errors, s.line_buffering, s.isatty(), s.fileno()]
                for s in (sys.stdin, sys.stdout, sys.stderr)],
    "handlers": {number: getattr(handler, "__name__", handler)
                 for number, handler in handlers.items()},
    "main": [__name__, main is not None and vars(main) is globals(), __package__, __doc__],
    "file": globals().get("__file__"),
    "spec": __spec__ and __spec__.name,
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "open files": sorted(os.read(int(one), 9).decode() for one in sys.argv[1:]),
}))
"""


def run(python: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    settings = {"env": interpreter.environment(), "timeout": TIMEOUT_S, **options}
    return subprocess.run([python, *words], capture_output=True, text=True, **settings)


def start(code: str) -> subprocess.Popen[str]:
    """Start code in a fork and wait until it has said its process id."""
    said = "import os, signal, sys, time; print(os.getpid(), flush=True)"
    return subprocess.Popen(
        [interpreter.warm(), "-c", f"{said}\n{code}"], env=interpreter.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("way", ["-c", "-m", "file", "-u"])
def test_a_fork_sees_what_a_fresh_python_sees(way: str, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    program = {
        "-c": ["-c", PROBE], "-m": ["-m", "probe"], "file": ["probe.py"], "-u": ["-u", "probe.py"],
    }[way]  # fmt: skip
    seen = []
    for python in (sys.executable, interpreter.warm()):
        given, wanted = os.pipe()
        os.write(wanted, b"in a pipe")
        done = run(
            python, *program, str(given), pass_fds=[given], cwd=tmp_path, umask=0o027, input="in",
            env={**interpreter.environment(), "OF_MINE": "\udcff", "RANK": "3"},
        )  # fmt: skip
        os.close(given)
        os.close(wanted)
        assert done.returncode == 0, done.stderr
        seen.append(json.loads(done.stdout))
        seen[-1]["arguments"].pop()  # the number of the pipe
        for name in OF_A_SHELL:
            seen[-1]["environment"].pop(name, None)
    cold, warm = seen
    beyond = warm["rest of the path"][len(cold["rest of the path"]) :]
    assert all("_vendor" in path for path in beyond)  # what setuptools adds when it is imported
    warm["rest of the path"] = warm["rest of the path"][: -len(beyond) or None]
    assert warm == cold
    assert warm["open files"] == ["in a pipe"]


ENDS = {
    "the end": "print('buffered'); import atexit; atexit.register(print, 'at the end')",
    "a code": "print('buffered'); sys.exit(3)",
    "a text": "sys.exit('no')",
    "an exception": "print('buffered'); raise ValueError('wrong')",
    "at once": "os._exit(5)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "a large code": "sys.exit(300)",
    "a closed pipe": "import subprocess; print('lost'); sys.stdout.flush(); os.close(1)\n"
    "print('nowhere')",
    "a thread": "import threading; threading.Timer(0.2, print, ['of the thread']).start()",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT); time.sleep(1)",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_ends_as_a_fresh_python_does(end: str) -> None:
    code = f"import os, signal, sys, time\n{ENDS[end]}"
    cold, warm = (run(python, "-c", code) for python in (sys.executable, interpreter.warm()))
    assert warm.returncode == cold.returncode
    assert warm.stdout == cold.stdout
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]  # below a traceback


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_fork_and_only_once(number: signal.Signals) -> None:
    process = start(
        "got = []\n"
        f"signal.signal({int(number)}, lambda number, _: got.append(number))\n"
        "print('ready', flush=True)\n"
        "while not got:\n"
        "    time.sleep(0.01)\n"
        "time.sleep(0.3)\n"  # for a second one
        "sys.exit(len(got))"
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1


def test_a_fork_is_killed_with_the_process_that_stands_for_it() -> None:
    process = start("time.sleep(100)")
    assert process.stdout is not None
    fork = int(process.stdout.readline())
    assert fork != process.pid
    process.kill()
    process.communicate(timeout=TIMEOUT_S)  # stdout has ended: nobody holds it open
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + TIMEOUT_S
    while is_there(fork) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_there(fork)


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


MODULES = "import sys; print('torch' in sys.modules, 'megatron.core' in sys.modules)"


def test_a_fork_has_imported_this_tree_and_what_it_starts_is_a_fork_too() -> None:
    code = (
        f"{MODULES}; print(sys.modules['hybrid_train.jobs.pretraining'].__file__)\n"
        f"import subprocess; subprocess.run([sys.executable, '-c', {MODULES!r}])"
    )
    done = run(interpreter.warm(), "-u", "-c", code)
    place = interpreter.ROOT / "hybrid_train" / "jobs" / "pretraining.py"
    assert done.stdout.splitlines() == ["True True", str(place), "True True"]


def test_processes_of_multiprocessing_are_started_anew(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import multiprocessing, sys\n"
        "def look():\n"
        "    print('torch' in sys.modules, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=look)\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    for program in (["program.py"], ["-m", "program"]):
        done = run(interpreter.warm(), *program, cwd=tmp_path)
        assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("options", ["-Xutf8", "-Wignore", "-s"])
def test_a_python_with_options_is_started_cold(options: str) -> None:
    done = run(interpreter.warm(), options, "-c", f"{MODULES}; print(sys.executable)")
    assert done.stdout.splitlines() == ["False False", sys.executable]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTHONPATH", "elsewhere"), ("TORCH_LOGS", "all"), ("CUDA_VISIBLE_DEVICES", "7"),
        ("OMP_NUM_THREADS", "2,1"),
    ],
)  # fmt: skip
def test_an_environment_that_matters_at_import_is_refused_by_name(name: str, value: str) -> None:
    done = run(interpreter.warm(), "-c", "", env={**interpreter.environment(), name: value})
    assert done.returncode == 1
    assert "start it cold" in done.stderr
    assert name in done.stderr


def test_threads_and_random_numbers_are_those_of_a_fresh_torch() -> None:
    code = (
        "import random, numpy, torch; print(torch.get_num_threads());"
        "print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    )
    for threads in ("1", "2")[: os.cpu_count()]:
        environment = {**interpreter.environment(), "OMP_NUM_THREADS": threads}
        pythons = (sys.executable, interpreter.warm(), interpreter.warm())
        done = [run(python, "-c", code, env=environment).stdout.splitlines() for python in pythons]
        assert [lines[0] for lines in done] == [threads] * 3
        drawn = zip(*(lines[1].split() for lines in done), strict=True)
        assert all(len(set(numbers)) == 3 for numbers in drawn)
