"""One process as the reference of each model, and cases compared with it."""

import copy
from dataclasses import replace
from pathlib import Path

from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.parity import measure
from tests.parity.case import Case
from tests.parity.verdict import Verdict, judge


class Suite:
    """Runs cases; what one process computes with their model is written once, to a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reports: dict[str, list[dict[str, float]]] = {}

    def reference(self, case: Case) -> list[dict[str, float]]:
        """Return the numbers of every step of the model of a case on one process."""
        alone, name = _alone(case), self._name(case)
        if name not in self._reports:
            (self._folder / name).mkdir()
            ranks = run_distributed(measure.write_reference, 1, alone, self._folder / name)
            self._reports[name] = ranks[0]
        return self._reports[name]

    def compare(self, case: Case, fault: str | None = None) -> Verdict:
        """Run a case on its processes, perhaps with a planted fault."""
        reports = self.reference(case)
        folder = self._folder / self._name(case)
        outcomes = run_distributed(measure.measure, case.processes, case, folder, fault)
        return judge(outcomes, reports, case.job)

    def _name(self, case: Case) -> str:
        job = _alone(case).job
        named = (job.model, job.train, job.precision, job.objective, case.packed)
        return measure.digest(repr(named).encode())


def _alone(case: Case) -> Case:
    job = copy.deepcopy(case.job)
    job.parallel = Parallel()
    job.model.pattern = job.model.pattern.replace("|", "")
    return replace(case, job=job, processes=1)
