"""What copies of checkpoints cost the steps: pairs of runs, one with checkpoint.url, one without.

    python tests/benchmarks/checkpoint_copies.py [--rounds 5] [--steps 40] [SETTING ...]

The copies go to an S3-compatible server (moto) in a process of its own on this machine, which takes
its part of the same cores. Both runs of a round save alike; which comes first alternates. Printed
are the mean time of a step, the ratio of each round, and the megabytes a second of the copies.
"""

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.jobs.command import finish, metrics, start
from tests.jobs.s3_server import BUCKET, KEYS

_COPIED = re.compile(r"copied step_\d+ to \S+: ([\d.]+) MB in ([\d.]+) s")


def main() -> None:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("settings", nargs="*", help="overrides of experiment=tiny_cpu")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint, AWS_DEFAULT_REGION="us-east-1")
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server, tempfile.TemporaryDirectory() as folder:
        try:
            _make_bucket(endpoint)
            _measure(options, Path(folder))
        finally:
            server.terminate()


def _make_bucket(endpoint: str) -> None:
    import fsspec

    for _ in range(100):
        try:
            fsspec.filesystem("s3", endpoint_url=endpoint).mkdir(BUCKET)
        except Exception:  # it is not up yet
            time.sleep(0.3)
        else:
            return
    raise SystemExit("the server does not answer")


def _measure(options: Any, folder: Path) -> None:
    ratios, speeds, steps = [], list[float](), {"without": list[float](), "with": list[float]()}
    for number in range(options.rounds):
        order = ("without", "with") if number % 2 else ("with", "without")
        for kind in order:
            seconds, found = _run(options, folder / f"{kind}{number}", kind == "with")
            steps[kind].append(seconds)
            speeds += found
        ratios.append(steps["with"][-1] / steps["without"][-1])
        print(
            f"round {number}: {steps['without'][-1] * 1e3:.1f} ms without, "
            f"{steps['with'][-1] * 1e3:.1f} ms with, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    for kind, found in steps.items():
        print(f"{kind}: {statistics.median(found) * 1e3:.1f} ms a step")
    print(f"ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"copies: median {statistics.median(speeds):.0f} MB/s, {len(speeds)} of them")


def _run(options: Any, run_dir: Path, copies: bool) -> tuple[float, list[float]]:
    """Train; return seconds a step, pauses for saves among them, and MB/s of each copy."""
    url = [f"checkpoint.url=s3://{BUCKET}/{run_dir.name}"] if copies else []
    words = ["train", "experiment=tiny_cpu", f"run_dir={run_dir}", "runtime.threads=1"]
    words += [f"train.tokens={options.steps * 256}", f"checkpoint.interval={options.interval}"]
    ended = finish(start(*words, *url, *options.settings))
    assert ended.code == 0, ended.err
    lines = metrics(run_dir)[2:]  # the first steps warm up
    seconds = statistics.fmean(line["step_time_s"] + line.get("pause_s", 0.0) for line in lines)
    return seconds, [float(size) / float(s) for size, s in _COPIED.findall(ended.said) if float(s)]


if __name__ == "__main__":
    main()
