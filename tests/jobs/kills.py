"""A run with phases and packing that is killed again and again reads what a straight one reads.

    python -m tests.jobs.kills [--kills 50] [--folder DIR]

Prints each kill, and at the end whether the rows read - phase, row, source, documents, offsets -
and the metrics of every step are those of the run that was not killed.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid_train.data.synthetic import WordTokenizer
from hybrid_train.data.token_files import write_documents
from tests.jobs.command import TIMEOUT_S, arguments, finish, last_step, start_program, untimed

VOCAB = 61
SOURCES = {"web": (300, 5, 60), "code": (200, 20, 150)}  # documents, shortest, longest
STEP_TOKENS = 256
Row = tuple[int, list[list[int]]]  # source, pieces


def write_sources(folder: Path) -> list[str]:
    """Write token files and a tokenizer; return the overrides that name them."""
    chance = random.Random(0)
    WordTokenizer([f"w{number}" for number in range(1, VOCAB)]).save(folder / "tokenizer")
    for name, (number, shortest, longest) in SOURCES.items():
        documents = [
            [*(chance.randrange(1, VOCAB) for _ in range(chance.randint(shortest, longest))), 0]
            for _ in range(number)
        ]
        write_documents(folder / name, documents, vocab_size=VOCAB)
    held_out = [[*(chance.randrange(1, VOCAB) for _ in range(100)), 0] for _ in range(20)]
    write_documents(folder / "held_out", held_out, vocab_size=VOCAB)
    sources = ", ".join(
        f"{name}: {{train: [{folder / name}], validation: [{folder / 'held_out'}]}}"
        for name in SOURCES
    )
    return [
        "data=files",
        f"data.tokenizer={folder / 'tokenizer'}",
        f"data.sources={{{sources}, pairs: {{recall: {{keys: 20, values: 20, max_items: 8}}}}}}",
        "data.blend={web: 0.6, code: 0.3, pairs: 0.1}",
        "data.packing=best_fit",
    ]


def phases(steps: int) -> list[str]:
    """Half of the run on one blend and length, half on another; both of 256 tokens a step."""
    half = steps // 2 * STEP_TOKENS
    second = f"{{name: second, start: {half}, blend: {{web: 0.2, code: 0.8}}, sequence_length: 128"
    return [
        f"train.tokens={steps * STEP_TOKENS}",
        f"train.phases=[{{name: first}}, {second}, global_batch: 2, constant_lr: 1e-4}}]",
        "schedule=constant",
        "schedule.peak_lr=3e-3",
        "train.validation_interval=10",
    ]


def rows_read(trace: Path) -> dict[tuple[int, int], Row]:
    """Read a trace: what each row of each phase was; a row that is read again must be the same."""
    found: dict[tuple[int, int], Row] = {}
    for line in trace.read_text().splitlines():
        phase, row, source, pieces = json.loads(line)
        earlier = found.setdefault((phase, row), (source, pieces))
        assert earlier == (source, pieces), f"row {row} of phase {phase} was another before"
    return found


@contextmanager
def traced(trace: Path) -> Iterator[None]:
    """Have runs write what they read."""
    os.environ["TRACE"] = str(trace)
    try:
        yield
    finally:
        del os.environ["TRACE"]


def run_to_the_end(run_dir: Path, trace: Path, *overrides: str) -> None:
    with traced(trace):
        finished = finish(start_program("-m", "tests.jobs.traced", *arguments(run_dir, *overrides)))
    assert finished.code == 0, finished.err


def lines_of(trace: Path) -> int:
    return trace.read_bytes().count(b"\n") if trace.exists() else 0


def kill_once(run_dir: Path, trace: Path, chance: random.Random, *overrides: str) -> int:
    """Kill a run at some moment after some rows more; return the rows read so far."""
    wanted = lines_of(trace) + chance.randint(1, 40)
    with traced(trace):
        process = start_program("-m", "tests.jobs.traced", *arguments(run_dir, *overrides))
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and lines_of(trace) < wanted and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    finish(process)
    with trace.open("r+b") as file:  # the last line may be half written
        whole = file.read().rpartition(b"\n")
        file.truncate(len(whole[0]) + len(whole[1]))
    return lines_of(trace)


def compare(straight: Path, killed: Path, one: Path, other: Path) -> int:
    """Compare traces and metrics; return how many rows there are."""
    expected, found = rows_read(one), rows_read(other)
    assert found == expected
    assert untimed(killed) == untimed(straight)
    return len(expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    steps = max(20, 4 * given.kills)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        overrides = [*write_sources(folder), *phases(steps), "checkpoint.interval=3"]
        run_to_the_end(folder / "straight", folder / "straight.jsonl", *overrides)
        killed, trace = folder / "killed", folder / "killed.jsonl"
        for number in range(given.kills):
            rows = kill_once(killed, trace, chance, *overrides)
            print(f"kill {number + 1}: after {rows} rows, step {last_step(killed)}", flush=True)
        run_to_the_end(killed, trace, *overrides)
        rows = compare(folder / "straight", killed, folder / "straight.jsonl", trace)
    print(f"{given.kills} kills: all {rows} rows and all metrics are those of the straight run")


if __name__ == "__main__":
    main()
