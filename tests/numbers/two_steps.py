"""Trains two steps with each of many values, each in a process of its own: a fork of this one.

    python tests/numbers/two_steps.py REQUEST ANSWER

REQUEST is a JSON list of lists of overrides of a tiny run; ANSWER gets one object for each. To be
started where torch and Megatron are imported already (`tests/warm`).
"""

import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid_train.jobs import train
from hybrid_train.schema.problems import UserError
from tests.numbers.tried import composer

REFUSED = 2  # exit code
LIMIT_S = 120  # far beyond what two steps take
MEMORY = 16 * 2**30  # of addresses; far beyond what a tiny run asks for
TIMING = ("tokens_per_s", "step_time_s", "pause_s", "save_time_s", "validation_time_s", "mfu")


@dataclass
class Outcome:
    """How a run ended."""

    code: int | None  # None: it did not end by itself
    seconds: float
    steps: int
    finite: bool
    left: list[Any]  # metrics and names of files, to be compared with another run
    said: str  # the end of it

    @property
    def is_sound(self) -> bool:
        """Whether it trained to its end, and all metrics are finite."""
        return self.code == 0 and self.steps > 0 and self.finite

    @property
    def is_refused(self) -> bool:
        """Whether it was refused before anything was written."""
        return self.code == REFUSED and not any("run/" in name for name in self.left[1])


def start(job: Any, folder: Path) -> int:
    """Fork a process that trains; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with (folder / "said.txt").open("wb") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        job.run_dir = str(folder / "run")
        code = train.run(job)
    except UserError as error:
        print(error)
        code = REFUSED
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child: int) -> int | None:
    """Return the exit code of a process, None if it has to be ended."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def outcome(code: int | None, seconds: float, folder: Path) -> Outcome:
    """Look at what a run has left."""
    metrics: list[dict[str, Any]] = []
    if (folder / "run" / "metrics.jsonl").exists():
        text = (folder / "run" / "metrics.jsonl").read_text()
        metrics = [json.loads(one) for one in text.splitlines()]
    numbers = [value for one in metrics for value in one.values()]
    untimed = [{name: one[name] for name in one if name not in TIMING} for one in metrics]
    files = sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())
    said = (folder / "said.txt").read_text(errors="replace")[-3000:]
    finite = all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)
    return Outcome(code, seconds, len(metrics), finite, [untimed, files], said)


def main(request: Path, answer: Path) -> None:
    outcomes = []
    for number, lines in enumerate(json.loads(request.read_text())):
        folder = answer.parent / str(number)
        folder.mkdir()
        job, began = composer("train").job(*lines), time.monotonic()
        code = wait(start(job, folder))
        outcomes.append(asdict(outcome(code, time.monotonic() - began, folder)))
        shutil.rmtree(folder)
    answer.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
