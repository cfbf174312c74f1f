"""The job `evaluate`: measures models on held-out text and tasks, and prints a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.runtime import ranks
from hybrid_train.runtime.start import process
from hybrid_train.schema.job_roots import EvaluateJob
from hybrid_train.schema.names import listed_paths

if TYPE_CHECKING:
    from hybrid_train.evaluation.results import Result

_NOTE = (
    "* is one per token of each model's own tokenizer, and these have several: bits per byte are "
    "the same measure for all."
)


def run(job: EvaluateJob) -> None:
    """Measure each model on all that no result is there of yet, and print the table."""
    with process(job.runtime, job.seed):
        from hybrid_train.jobs.measurement import Candidate, Evaluation  # they need the process
        from hybrid_train.megatron.data_parallel import destroy_groups

        try:
            candidates = [Candidate.of(one, "checkpoint") for one in listed_paths(job.checkpoint)]
            against = None if job.against is None else Candidate.of(job.against, "against")
            found = Evaluation.of(job, candidates, against).results()
            if ranks.is_main():
                _show([one.label for one in candidates], found)
        finally:
            destroy_groups()


def _show(labels: Sequence[str], found: "Sequence[Sequence[Result]]") -> None:
    """Print the figures of all tasks in one table."""
    from hybrid_train.evaluation.results import heads, rows

    lines = [line for results in found for line in rows(results)]
    page = console()
    show_numbers(page, lines, heads(labels), words=3)
    if any(metric.endswith("*") for _, _, metric, *_ in lines):
        page.print(_NOTE)
