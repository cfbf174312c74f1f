"""Time from the start of a command to its first line, as a user starts it; the best of several.

python -m tests.benchmarks.first_line [--times 3]

Each command runs in an empty folder and is ended at its first line. On a machine that does other
things, the time of a processor is what a free one would take.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train": ["train", "experiment=tiny_cpu"],
    "check": ["check", "experiment=nemotron3_super", "processes=1024"],
    "generate": ["generate", "checkpoint=run", "prompt=x"],
    "study": ["study", "name=precision", "run_dir=study"],
    "status": ["status", "run_dir=run"],
    "submit": ["submit", "--dry-run", "experiment=nemotron_h_56b", "cluster=slurm_h100"],
    "train --help": ["train", "--help"],
    "--help": ["--help"],
}


def first_line(words: list[str], folder: str) -> tuple[float, float, str]:
    """Start a command; return seconds, and those of a processor, until its first line, and that."""
    command = [sys.executable, "-m", "hybrid_train", *words]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline().rstrip()
    seconds = time.perf_counter() - start
    # Fields 14 and 15 of proc(5), in ticks, behind the name in brackets: of user and of kernel.
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    processor = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    process.kill()
    process.communicate()
    return seconds, processor, line


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run").mkdir()
        (Path(folder) / "run" / "config.yaml").touch()
        for name, words in COMMANDS.items():
            tries = [first_line(words, folder) for _ in range(times)]
            seconds, processor = (min(one[part] for one in tries) for part in (0, 1))
            figures = f"{seconds:5.2f} s, {processor:4.2f} s of a processor"
            print(f"{name:14}{figures}: {tries[0][2][:60]}")


if __name__ == "__main__":
    main()
