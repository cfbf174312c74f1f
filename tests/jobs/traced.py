"""Runs `hybrid-train` and writes down every row that training reads, to the file that $TRACE names.

A line is: phase, row of the phase, source, then document, start and stop of each piece.
"""

import json
import os
import sys
from typing import Any

from hybrid_train.data import run_data
from hybrid_train.data.plan import Mixture
from hybrid_train.jobs.cli import main

_FILE = os.open(os.environ["TRACE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_PHASES: dict[int, int] = {}  # number of the phase of each mixture
_fill, _plan_phases = Mixture.fill, run_data.plan_phases


def fill(self: Mixture, row: int) -> Any:
    pieces = [list(piece) for piece in self.spans(row)]
    line = json.dumps([_PHASES[id(self)], row, self.origin(row).source, pieces])
    os.write(_FILE, f"{line}\n".encode())
    return _fill(self, row)


def plan_phases(*arguments: Any) -> Any:
    plans = _plan_phases(*arguments)
    _PHASES.update({id(plan.mixture): number for number, plan in enumerate(plans)})
    return plans


if __name__ == "__main__":
    Mixture.fill = fill  # type: ignore[method-assign]
    run_data.plan_phases = plan_phases
    sys.exit(main())
