"""Prints the tables of the parity suite; `make parity` runs it.

python -m tests.parity layouts [NAME ...]     every layout against one process
python -m tests.parity packed [NAME ...]      the same on rows of several documents
python -m tests.parity quantized [NAME ...]   the same in FP8 and FP4, one step
python -m tests.parity taught [NAME ...]      the same with a teacher
python -m tests.parity dense [NAME ...]       Transformers, and a hybrid with positions
python -m tests.parity faults [NAME ...]      planted faults and what found them
python -m tests.parity draw SEED [SEED ...]   random legal cases, by their seeds
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.parity.case import Case
from tests.parity.draws import describe, draw
from tests.parity.faults import FAULTS
from tests.parity.layouts import CASES, DENSE, LAYOUTS, PACKED, QUANTIZED, TAUGHT
from tests.parity.suite import Suite
from tests.parity.verdict import Verdict


def main() -> int:
    """Print the asked tables; return 1 if a case disagrees or a fault stays hidden."""
    wanted, names = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("all", [])
    tables: dict[str, Callable[[Sequence[str]], bool]] = {
        "layouts": _layouts,
        "packed": _packed,
        "quantized": _quantized,
        "taught": _taught,
        "dense": _dense,
        "faults": _faults,
        "draw": _draws,
    }
    if wanted == "all":
        every = [run([]) for name, run in tables.items() if name != "draw"]
        return int(not all(every))
    if wanted not in tables:
        sys.exit(__doc__)
    return int(not tables[wanted](names))


def _layouts(names: Sequence[str]) -> bool:
    return _compared(LAYOUTS, names)


def _packed(names: Sequence[str]) -> bool:
    return _compared(PACKED, [f"packed, {name}" for name in names])


def _quantized(names: Sequence[str]) -> bool:
    return _compared(QUANTIZED, names)


def _taught(names: Sequence[str]) -> bool:
    return _compared(TAUGHT, [one if one in TAUGHT else f"taught, {one}" for one in names])


def _dense(names: Sequence[str]) -> bool:
    return _compared(DENSE, names)


def _compared(cases: dict[str, Case], names: Sequence[str]) -> bool:
    print(_HEADER)
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder))
        report = suite.reference(next(iter(cases.values())))[0]
        print(f"{'one process':32} {1:9} {report['loss']:10.6f} {report['grad_norm']:10.6f}")
        verdicts = [
            _show(name, case.processes, suite.compare(case))
            for name, case in cases.items()
            if not names or name in names
        ]
    return all(verdicts)


def _draws(seeds: Sequence[str]) -> bool:
    print(_HEADER)
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder))
        for seed in map(int, seeds):
            case = draw(seed)
            verdicts.append(_show(f"draw {seed}", case.processes, suite.compare(case)))
            print(f"  {describe(case)}")
    return all(verdicts)


def _faults(names: Sequence[str]) -> bool:
    print(f"{'planted fault':52} {'layout':11} what found it")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder))
        for name, fault in FAULTS.items():
            if names and name not in names:
                continue
            hit = fault.noticed(suite.compare(CASES[fault.layout], name).problems)
            print(f"{name:52} {fault.layout:11} {hit or 'NOT FOUND'}", flush=True)
            found.append(hit is not None)
    return all(found)


_HEADER = (
    f"{'layout':32} {'processes':>9} {'loss':>10} {'grad norm':>10} {'numbers':>8} "
    f"{'gradients':>10} {'weights':>8}   worst gradient\n"
    f"{'':64} {'(ulps)':>8} {'(ulps)':>10} {'(way)':>8}"
)


def _show(name: str, processes: int, verdict: Verdict) -> bool:
    print(
        f"{name:32} {processes:9} {verdict.loss:10.6f} {verdict.grad_norm:10.6f} "
        f"{verdict.number_ulps:8.1f} {verdict.gradient_ulps:10.1f} {verdict.weight_way:8.1e}   "
        f"{verdict.worst_gradient}",
        flush=True,
    )
    for problem in verdict.problems[:5]:
        print(f"  {problem}")
    return not verdict.problems


if __name__ == "__main__":
    sys.exit(main())
