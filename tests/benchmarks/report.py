"""Time and size of `status` and `report` for a run of many steps, made for the purpose.

python tests/benchmarks/report.py --steps 100000
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hybrid_train.schema.units import show_bytes
from tests.unit.jobs.synthetic_run import make

ROOT = Path(__file__).parents[2]


def timed(*words: str) -> tuple[float, float, str]:
    """Run a command; return wall time, processor time, and what it printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "hybrid_train", *words],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, processor, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=24, help="with experts")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sources = ("web", "code", "math", "books")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = make(
            Path(folder) / "run", steps=options.steps, start=time.time() - options.steps,
            sources=sources, layers=options.layers,
        )  # fmt: skip
        size = (run_dir / "metrics.jsonl").stat().st_size
        print(f"{options.steps:,} steps, metrics.jsonl {show_bytes(size)}")
        for job in ("status", "report"):
            best = min(timed(job, f"run_dir={run_dir}")[:2] for _ in range(options.rounds))
            print(f"{job}: {best[0]:.2f} s, of the processor {best[1]:.2f} s")
        page = run_dir / "report.html"
        print(f"{page.name}: {show_bytes(page.stat().st_size)}")


if __name__ == "__main__":
    main()
