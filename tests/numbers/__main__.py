"""Ask for every value of every number and train with what is accepted; print the counts.

python -m tests.numbers [--folder DIR]
"""

import argparse
import tempfile
import time
from pathlib import Path

from tests.numbers.answers import pairs, refusals, train
from tests.numbers.tried import BASES, every, fields_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    began = time.monotonic()
    asked = refusals(pairs(every()))
    accepted = [one for one, said in asked.items() if said is None]
    print(f"{len(every())} fields of {len(BASES)} jobs, {len(asked)} values: ", end="")
    print(f"{len(asked) - len(accepted)} refused, {len(accepted)} accepted", end="")
    print(f" in {time.monotonic() - began:.0f} s", flush=True)
    runs = [one for one in accepted if one.field in fields_of("train") and not one.is_for_others]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        outcomes = train([one.lines for one in runs], Path(name))
    bad = [
        (pair.line, run)
        for pair, run in zip(runs, outcomes, strict=True)
        if not run.is_sound and not run.is_refused
    ]
    late = sum(run.is_refused for run in outcomes)
    print(f"{len(runs) - late} trained, {late} refused before anything was written", end="")
    print(f" in {time.monotonic() - began:.0f} s; {len(bad)} bad")
    for line, run in bad:
        print(f"{line}: exit code {run.code}, {run.steps} steps\n{run.said}")


if __name__ == "__main__":
    main()
