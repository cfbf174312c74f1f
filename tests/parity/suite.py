"""One process as the reference of a model, and cases compared with it."""

import copy

from hybrid_train.config.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.parity import measure
from tests.parity.case import Case, parity_job
from tests.parity.verdict import Verdict, judge


class Reference:
    """What one process computes with the model of a case; its files lie in an empty folder."""

    def __init__(self, folder: str, case: Case | None = None) -> None:
        job = copy.deepcopy(case.job if case else parity_job())
        job.parallel = Parallel()
        job.model.pattern = job.model.pattern.replace("|", "")
        self._folder = folder
        alone = Case(job, processes=1)
        self.reports = run_distributed(measure.write_reference, 1, alone, folder)[0]

    def compare(self, case: Case, fault: str | None = None) -> Verdict:
        """Run a case on its processes, perhaps with a planted fault."""
        outcomes = run_distributed(measure.measure, case.processes, case, self._folder, fault)
        return judge(outcomes, self.reports)
