"""A long run that many faults happen to: does it end by itself, as one that none happened to?

    python -m tests.faults [--faults 30] [--steps 700] [--seed 0] [--folder DIR]

Prints every fault and what the history tells of it, the goodput, and the time that a kill costs.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from hybrid_train.tracking import history
from tests.faults import drill


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=None)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    faults = drill.draw(given.faults, given.steps, given.seed, given.kinds)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        of_data = [fault for fault in faults if fault["kind"] in drill.OF_DATA]
        straight = drill.run(folder / "straight", of_data, given.steps)
        print(f"straight: {given.steps} steps in {straight.seconds:.0f} s", flush=True)
        outcome = drill.run(folder / "struck", faults, given.steps)
        print(f"with {given.faults} faults: {outcome.seconds:.0f} s, {outcome.commands} commands")
        report(faults, outcome)
        drill.compare(outcome, straight, given.steps)
        print("all metrics and all tensors at the end are those of the straight run, to the bit")


def report(faults: list[drill.Fault], outcome: drill.Outcome) -> None:
    """Print what the history tells, and what the faults cost."""
    events = history.read(outcome.run_dir)
    for event in events:
        if event["event"] != history.ATTEMPT:
            words = {key: value for key, value in event.items() if key not in ("time", "attempt")}
            print("  ", words)
    absent = drill.missing(faults, events)
    print(f"faults told with their right cause: {len(faults) - len(absent)} of {len(faults)}")
    for fault in absent:
        print("   not told:", fault)
    lost = drill.lost_seconds(faults, outcome, ["kill"])
    print(f"time lost by a kill, median of {len(lost)}: {drill.median(lost):.1f} s")
    unasked = drill.unasked(faults, events)
    print(f"attempts that ended without a fault: {unasked}")
    subprocess.run(
        [sys.executable, "-m", "hybrid_train", "status", f"run_dir={outcome.run_dir}"], check=True
    )
    assert not absent
    assert not unasked


if __name__ == "__main__":
    main()
