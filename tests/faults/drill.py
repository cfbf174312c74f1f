"""Drives a run that faults happen to, and says whether it came out as one without them."""

import json
import random
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_train.tracking import history
from tests.jobs.command import ROOT, arguments, assert_equal_to_the_bit, untimed
from tests.jobs.kills import write_sources
from tests.warm import interpreter

PROCESSES = 2
INTERVAL = 10  # steps between checkpoints
TOKENS_A_STEP = 256
OF_DATA = ("nan", "spike")
# What the history must say of each fault: kind of the end, or the event beside.
TOLD: dict[str, tuple[str, str]] = {
    "kill": (history.END, "killed"),
    "hang": (history.END, "hang"),
    "stop": (history.END, "hang"),
    "sigterm": (history.END, "signal"),
    "sigusr1": (history.END, "signal"),
    "corrupt": ("fallback", ""),
    "full": ("save failed", ""),
    "vanish": (history.END, "data"),
    "nan": ("skipped", "nan"),
    "spike": ("skipped", "standard deviations"),
    "slow": ("stragglers", ""),
}
WATCH = (
    "runtime.hang_timeout_s=8",
    "runtime.timeout_s=60",
    "recovery.spike_window=8",
    "recovery.straggler_interval=10",
    "checkpoint.keep=3",
    f"checkpoint.interval={INTERVAL}",
    "schedule=constant",
    "schedule.peak_lr=1e-3",
    "tracking.console_interval=1000",
    "train.validation_interval=0",
)
Fault = dict[str, Any]


def draw(number: int, steps: int, seed: int, of: Sequence[str] | None = None) -> list[Fault]:
    """Draw faults of all kinds at steps that are apart, so that each has an effect of its own."""
    chance = random.Random(seed)
    known = list(of or TOLD)
    kinds = known * (number // len(known)) + chance.sample(known, number % len(known))
    chance.shuffle(kinds)
    apart = (steps - 40) // number
    places = [30 + apart * place + chance.randrange(max(1, apart // 3)) for place in range(number)]
    return [
        {"id": number, "kind": kind, "step": step, "rank": chance.randrange(PROCESSES)}
        for number, (kind, step) in enumerate(zip(kinds, map(_late, kinds, places), strict=True))
    ]


def _late(kind: str, step: int) -> int:
    """Damage a checkpoint well after the last save began: it must be the one that is read next."""
    return step // INTERVAL * INTERVAL + 8 if kind == "corrupt" else step


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        folder: with its data, its list of faults and its run folder.
        commands: how often it was started from outside.
        seconds: in all.
    """

    folder: Path
    commands: int
    seconds: float

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def struck(self) -> dict[int, float]:
        """Return when each fault of a process happened."""
        path = self.folder / "faults.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return {line["id"]: line["time"] for line in map(json.loads, lines)}

    def steps(self) -> list[tuple[int, float]]:
        """Return the steps that were taken, and when; some of them twice."""
        lines = (self.folder / "faults.steps").read_text().splitlines()
        return [(step, moment) for step, moment in map(json.loads, lines)]


def run(folder: Path, faults: Sequence[Fault], steps: int, *overrides: str) -> Outcome:
    """Train to the end, whatever happens; start it again when it stopped, as a scheduler would."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [*write_sources(folder), f"train.tokens={steps * TOKENS_A_STEP}", *WATCH, *overrides]
    (folder / "faults.json").write_text(json.dumps(list(faults)))
    shutil.copytree(folder, folder / "backup", ignore=shutil.ignore_patterns("backup"))
    start, commands = time.monotonic(), 0
    with data_that_comes_back(folder):
        while not _finished(folder / "run"):
            commands += 1
            if commands > len(faults) + 2:
                raise RuntimeError("the run does not come to its end")
            _start(folder, settings)
    return Outcome(folder, commands, time.monotonic() - start)


def _start(folder: Path, settings: Sequence[str]) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    words += ["--max-restarts", "100", "-m", "tests.faults.victim"]
    environment = {**interpreter.environment(), "FAULTS": str(folder / "faults.json")}
    with (folder / "said.log").open("a") as said:
        subprocess.run(
            [interpreter.warm(), *words, *arguments(folder / "run", *settings)],
            stdout=said, stderr=said, env=environment, cwd=ROOT, check=False,
        )  # fmt: skip


def _finished(run_dir: Path) -> bool:
    ended = history.attempts(history.read(run_dir)) if run_dir.exists() else []
    return bool(ended) and ended[-1].outcome == history.FINISHED


@contextmanager
def data_that_comes_back(folder: Path) -> Iterator[None]:
    """Bring back token files that were cut short, two seconds later."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            cut = [path for path in folder.glob("*.bin") if path.stat().st_size == 0]
            if cut and not over.wait(2):
                for path in cut:
                    whole = folder / "backup" / path.name
                    half = path.with_suffix(".half")
                    shutil.copyfile(whole, half)
                    half.replace(path)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def missing(faults: Sequence[Fault], events: Sequence[history.Event]) -> list[Fault]:
    """Return the faults that the history does not tell with their right cause, in order."""
    left = list(events)
    absent = []
    for fault in faults:
        found = next((event for event in left if _tells(event, fault)), None)
        if found is None:
            absent.append(fault)
        else:
            left.remove(found)
    return absent


def unasked(faults: Sequence[Fault], events: Sequence[history.Event]) -> int:
    """Return how many attempts ended without a fault that ends one."""
    deadly = [fault for fault in faults if TOLD[fault["kind"]][0] == history.END]
    deadly += [fault for fault in faults if fault["kind"] == "corrupt"]  # it kills, too
    ends = [event for event in events if event["event"] == history.END]
    return len(ends) - 1 - len(deadly)  # the last one is the end of the run


def _tells(event: history.Event, fault: Fault) -> bool:
    name, words = TOLD[fault["kind"]]
    if event["event"] != name:
        return False
    if name == history.END:
        return event["kind"] == words and fault["rank"] in event["ranks"]
    if name == "skipped":
        return event["step"] == fault["step"] and words in event["cause"]
    if name == "stragglers":
        near = 0 <= event["step"] - fault["step"] < 3 * INTERVAL
        return near and any(
            line.startswith(f"rank {fault['rank']}, data") for line in event["slow"]
        )
    return True


def lost_seconds(faults: Sequence[Fault], outcome: Outcome, kinds: Sequence[str]) -> list[float]:
    """Return the time from each fault until its step was done: detection, restart, replay."""
    lost = []
    for fault in faults:
        moment = outcome.struck().get(fault["id"])
        if fault["kind"] in kinds and moment is not None:
            done = [when for step, when in outcome.steps() if step == fault["step"]]
            lost.append(min(when for when in done if when > moment) - moment)
    return lost


def compare(outcome: Outcome, straight: Outcome, steps: int) -> None:
    """Fail unless metrics and tensors are those of a run that nothing happened to."""
    assert untimed(outcome.run_dir) == untimed(straight.run_dir)
    assert_equal_to_the_bit(outcome.run_dir, straight.run_dir, steps)


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")
