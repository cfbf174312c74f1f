"""One stage, as a process: `python -m tests.gpu.stages.one NAME NOTES [--plain]`."""

import argparse
import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.gpu.check import ROOT, STAGES
from tests.gpu.stages.notes import Notes, SkippedStage

# Stage -> the module with a function of its name, imported when it runs: torch takes seconds.
WORK = {
    "audit": "quantized",
    "checkpoint": "moves",
    "doctor": "moves",
    "fp8_gather": "quantized",
    "gemms": "quantized",
    "memory": "steps",
    "scan": "scans",
    "steps_4b": "steps",
    "steps_8b": "steps",
    "steps_moe": "steps",
}
NO_TESTS = 5  # how pytest says that it ran none


def work_of(name: str) -> Callable[[Notes], None]:
    """Return what a stage does."""
    if any(one.test for one in STAGES if one.name == name):
        return lambda notes: run_tests(name, notes)
    module = importlib.import_module(f"tests.gpu.stages.{WORK[name]}")
    work: Callable[[Notes], None] = getattr(module, name)
    return work


def run_tests(name: str, notes: Notes) -> None:
    """Run a file of tests; each that does not pass is a figure beyond its limit."""
    file = f"tests/gpu/{name}.py"
    # Warnings of kernels that nobody here has seen must not fail what they come with.
    words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", "-rA", file]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr, sep="\n")
    lines = [line for line in done.stdout.splitlines() if line.startswith(OUTCOMES)]
    counts = {word: sum(line.startswith(word) for line in lines) for word in OUTCOMES}
    notes.flavour("pytest -m gpu")
    notes.row("passed", counts["PASSED"], "tests", headline=True)
    notes.row("skipped", counts["SKIPPED"], "lines of skips", headline=True)
    wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    notes.row("failed", len(wrong), "tests", limit=0, headline=True)
    if done.returncode == NO_TESTS:
        raise SkippedStage("no test of it could be run")
    if not counts["PASSED"] and not wrong and done.returncode == 0:
        skips = [line.partition(": ")[2] or line for line in lines]
        raise SkippedStage("; ".join(dict.fromkeys(skips)))
    if done.returncode or wrong:
        raise AssertionError("; ".join(wrong) or f"pytest ended with code {done.returncode}")


OUTCOMES = ("PASSED", "SKIPPED", "FAILED", "ERROR")


def main() -> None:
    """Run a stage and note its end; an error is a line of the table, and a stack in the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("notes", type=Path)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    notes = Notes(given.notes, given.plain)
    try:
        work_of(given.stage)(notes)
    except SkippedStage as skip:
        notes.end("skipped", str(skip))
        return
    except BaseException as error:  # any: what a device raises is not known
        traceback.print_exc()
        notes.end("failed", f"{type(error).__name__}: {str(error).strip()[:400]}")
        raise
    if notes.beyond:
        notes.end("failed", f"beyond its limit: {'; '.join(notes.beyond)}")
    else:
        notes.end("passed")


if __name__ == "__main__":
    main()
