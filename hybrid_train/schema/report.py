"""The roots of jobs that look at a run: status and report."""

from dataclasses import dataclass

from omegaconf import MISSING

from hybrid_train.schema.limits import FileName


@dataclass(kw_only=True)
class StatusJob:
    """How a run is, in words or as JSON."""

    run_dir: FileName = MISSING
    json: bool = False  # one JSON object, for scripts


@dataclass(kw_only=True)
class ReportJob:
    """One HTML file about a run."""

    run_dir: FileName = MISSING
    output: FileName | None = None  # None: report.html in the run folder
