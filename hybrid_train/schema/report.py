"""The roots of jobs that look at runs: status and report."""

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING

from hybrid_train.schema.limits import FILE, FileName
from hybrid_train.schema.listed import listed_paths
from hybrid_train.schema.problems import Problem


@dataclass(kw_only=True)
class RunsJob:
    """A job that looks at runs: run_dir=RUNS, repeated or with commas."""

    run_dir: list[str] = MISSING  # run folders, folders of runs, globs; run_dir=runs/a,runs/sweep

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if not listed_paths(self.run_dir):
            yield Problem("run_dir", "[]", "must name at least one run folder or folder of runs")
        for name in listed_paths(self.run_dir):
            if bad := FILE.broken(name):
                yield Problem("run_dir", name, bad[0])


@dataclass(kw_only=True)
class StatusJob(RunsJob):
    """How runs are, in words or as JSON."""

    json: bool = False  # one JSON object, for scripts


@dataclass(kw_only=True)
class ReportJob(RunsJob):
    """One HTML file about a run, or about several over each other."""

    output: FileName | None = None  # None: report.html in the run folder, or the folder of the runs
