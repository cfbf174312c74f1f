"""Times the start of a training run: from the start of the process to the end of the first step.

python tests/benchmarks/start_up.py [--imports 15]

Each experiment runs in a process of its own, once to build its data and once to be timed; the
clock is read after each phase. `--imports N` lists the N modules that take longest to import by
themselves, at the price of a slower start.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PHASES = (
    ("python and config", "config"),
    ("import torch", "torch"),
    ("import Megatron and the rest", "imports"),
    ("data", "data"),
    ("model and optimizer", "build"),
    ("peak of the machine, trackers", "ready"),
    ("first step", "step"),
)


def main() -> int:
    """Time both experiments, or be the process that is timed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imports", type=int, default=0, help="slowest modules to list")
    parser.add_argument("--timed", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.timed:
        return timed_run(arguments.timed)
    for experiment in ("tiny_cpu", "quickstart"):
        report(experiment, arguments.imports)
    return 0


def report(experiment: str, num_imports: int) -> None:
    """Run an experiment for one step, twice, and print where the second start took its time."""
    with tempfile.TemporaryDirectory() as folder:
        for attempt in ("builds the data", "is timed"):
            marks = Path(folder) / "marks.json"
            words = [f"experiment={experiment}", f"run_dir={folder}/{attempt.replace(' ', '_')}"]
            options = ["-X", "importtime"] if num_imports and attempt == "is timed" else []
            start = time.time()
            done = subprocess.run(
                [sys.executable, *options, __file__, "--timed", str(marks), *words],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                sys.exit(done.stderr)
        times = json.loads(marks.read_text())
    print(f"\n{experiment}: {times['step'] - start:.1f} s to the end of the first step")
    before = start
    for title, name in PHASES:
        print(f"  {title:<32}{times[name] - before:6.2f} s")
        before = times[name]
    for own, module in slowest_imports(done.stderr)[:num_imports]:
        print(f"  {module:<60}{own:6.3f} s by itself")


def slowest_imports(text: str) -> list[tuple[float, str]]:
    """Read what `-X importtime` wrote: seconds of each module without those that it imports."""
    found = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)", text)
    return sorted(((int(own) / 1e6, module) for own, module in found), reverse=True)


def timed_run(words: list[str]) -> int:
    """Run the job `train` until its first step is done, noting when each phase ended."""
    target, *overrides = words
    times: dict[str, float] = {}

    from hybrid_train.config.compose import compose

    job = compose("train", overrides)
    times["config"] = time.time()
    import torch  # noqa: F401

    times["torch"] = time.time()
    from hybrid_train.runtime.start import process

    with process(job.runtime, job.train.seed) as device:
        from hybrid_train.jobs import pretraining
        from hybrid_train.training.engine import Engine

        times["imports"] = time.time()
        note_after(pretraining, "open_run_data", times, "data")
        note_after(pretraining, "restore", times, "build")
        note_after(pretraining, "_trackers", times, "ready")
        note_after(Engine, "step", times, "step")
        job.train.tokens = str(job.train.global_batch * job.train.sequence_length)
        job.train.validation_batches = 1
        pretraining.train(job, device)
    Path(target).write_text(json.dumps(times))
    return 0


def note_after(owner: Any, name: str, times: dict[str, float], phase: str) -> None:
    """Note the time at which a call of a function ends."""
    function = getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        times[phase] = time.time()
        return result

    setattr(owner, name, noting)


if __name__ == "__main__":
    sys.exit(main())
