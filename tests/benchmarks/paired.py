"""Is anything slower than it was before? Times the same commands with two checkouts, in pairs.

    python tests/benchmarks/paired.py BEFORE [NAME ...] [--rounds 5]

BEFORE is another checkout. Each round runs a command with both, in turn the one or the other first:
a machine whose speed drifts slows both alike. Printed are the medians of what each took, and the
ratio now / before of the rounds: median, lowest, highest. What is timed:

    start_up    processor time of a run of one step
    step        median time of the steps of ladder_3m
    async_save  the same, with a checkpoint every third step
    tokenize    processor time of `data tokenize`, 10 MB of source code
    import      processor time of `convert import=` of a folder of 60M parameters
    export      processor time of `convert export=` of it
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parents[2]
TRAIN = (
    *("train", "experiment=ladder_3m", "data=quickstart_small", "model.vocab_size=512"),
    *("train.sequence_length=128", "train.microbatch=2", "train.global_batch=2"),
    *("train.validation_interval=0", "train.validation_batches=1", "runtime.threads=2"),
)
STEP_TOKENS = 2 * 128


@dataclass(frozen=True)
class Timed:
    """A command in a new folder, and what of it is compared."""

    words: Callable[[Path], list[str]]
    seconds: Callable[[Path, float], float]  # folder, processor time -> what is compared


def processor(_: Path, seconds: float) -> float:
    """Take the processor time of the whole command."""
    return seconds


def of_steps(folder: Path, _: float) -> float:
    """Take the median step, without the first ones."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["step_time_s"] for line in lines[3:])


def trained(steps: int, *more: str) -> Callable[[Path], list[str]]:
    """Return the words of a run of so many steps."""
    own = [f"train.tokens={steps * STEP_TOKENS}", *more]
    return lambda folder: [*TRAIN, f"run_dir={folder / 'run'}", *own]


def main() -> int:
    """Run the pairs and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    before = options.before.absolute()
    with tempfile.TemporaryDirectory() as name:
        commands = prepared(Path(name), before)
        for one in options.names or commands:
            compare(one, commands[one], before, options.rounds, Path(name))
    return 0


def prepared(folder: Path, before: Path) -> dict[str, Timed]:
    """Make what the commands read, with the older code, which both read; return them by name."""
    trained_once = folder / "trained"
    run(before, trained(1, "model=ladder_60m")(trained_once))
    run(before, ["convert", f"export={trained_once / 'run'}", f"output={folder / 'hf'}"])
    corpus = write_corpus(folder)
    tokenizer = trained_once / "run" / "tokenizer"
    return {
        "start_up": Timed(trained(1), processor),
        "step": Timed(trained(25, "checkpoint.interval=0"), of_steps),
        "async_save": Timed(trained(25, "checkpoint.interval=3", "checkpoint.keep=1"), of_steps),
        "tokenize": Timed(
            lambda to: [
                *("data", "tokenize", f"input={corpus}", f"output={to / 'corpus'}"),
                *(f"tokenizer={tokenizer}", "workers=2"),
            ],
            processor,
        ),
        "import": Timed(
            lambda to: ["convert", f"import={folder / 'hf'}", f"output={to / 'run'}"], processor
        ),
        "export": Timed(
            lambda to: ["convert", f"export={trained_once / 'run'}", f"output={to / 'hf'}"],
            processor,
        ),
    }


def write_corpus(folder: Path, size: int = 10_000_000) -> Path:
    """Write source files of the standard library as JSON lines, about `size` bytes."""
    path, written = folder / "corpus.jsonl", 0
    with path.open("w") as file:
        for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" not in source.parts and written < size:
                text = source.read_bytes().decode("utf-8", "replace")
                written += file.write(json.dumps({"text": text}) + "\n")
    return path


def compare(name: str, timed: Timed, before: Path, rounds: int, folder: Path) -> None:
    """Print how long a command takes with both checkouts."""
    checkouts = {"before": before, "now": HERE}
    seconds: dict[str, list[float]] = {"before": [], "now": []}
    for number in range(rounds):
        for which in ("before", "now") if number % 2 else ("now", "before"):
            with tempfile.TemporaryDirectory(dir=folder) as to:
                took = run(checkouts[which], timed.words(Path(to)))
                seconds[which].append(timed.seconds(Path(to), took))
    ratios = [now / then for now, then in zip(seconds["now"], seconds["before"], strict=True)]
    print(
        f"{name:<12}{statistics.median(seconds['before']):8.3f} s before"
        f"{statistics.median(seconds['now']):8.3f} s now   ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})",
        flush=True,
    )


def run(checkout: Path, words: list[str]) -> float:
    """Run a command with the code of a checkout; return its processor time, children included."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "hybrid_train", *words],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(words)}\n{done.stdout}{done.stderr}")
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


if __name__ == "__main__":
    sys.exit(main())
