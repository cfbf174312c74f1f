"""The table of phases that `check` prints: how long each is, and what it changes."""

from collections.abc import Iterator, Sequence

from rich.console import Console

from hybrid_train.jobs.help import show_numbers
from hybrid_train.jobs.run_plan import RunPlan
from hybrid_train.planning import degrees, stages
from hybrid_train.planning.phases import Stretch
from hybrid_train.schema.schedule import Wsd
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import show_bytes, show_tokens

_HEADS = (
    "phase", "start", "tokens", "steps", "sequence", "batch", "rate", "most kept", "layout",
)  # fmt: skip


def show_phases(page: Console, plan: RunPlan) -> None:
    """Print a row for each phase."""
    page.print()
    show_numbers(page, list(_rows(plan)), _HEADS)
    page.print(
        "\nBatch: sequences of a step. Rate: constant, where a phase is not in the schedule. Most "
        "kept: by the\nprocess that keeps most. Layout: where it is not that of the first phase.",
        soft_wrap=True,
    )


def _rows(plan: RunPlan) -> Iterator[tuple[str, ...]]:
    for one, asked in zip(plan.phases, plan.job.train.phases, strict=True):
        train, moved = one.job.train, one.job.parallel != plan.first.parallel
        yield (
            one.name,
            asked.start,
            show_tokens(one.end - one.start),
            f"{one.length.steps:,}",
            f"{train.sequence_length:,}",
            f"{train.global_batch:,}",
            "schedule" if asked.constant_lr is None else f"{asked.constant_lr:g}",
            show_bytes(stages.most_kept(one.job, plan.processes, plan.rows)),
            _layout(one.job, plan.processes) if moved else "",
        )


def _layout(job: TrainJob, processes: int) -> str:
    """Say the degrees in the words of the line `processes`."""
    plan = job.parallel
    data = degrees.data_parallel(plan, processes)
    words = f"tensor {plan.tensor} x pipeline {plan.pipeline} x context {plan.context}"
    words += f" x data {data:,}"
    return f"{words}, expert {plan.expert}" if "E" in job.model.pattern else words


def decay_steps(phases: Sequence[Stretch], decay: int) -> int:
    """Count the steps of the last `decay` tokens of the schedule.

    Phases with a rate of their own are not in it, and those that are may differ in their steps.
    """
    found = 0
    for one in phases:
        if isinstance(one.schedule, Wsd):
            start = max(one.rate_start, one.rate_tokens - decay)
            end = min(one.rate_start + one.end - one.start, one.rate_tokens)
            step = one.job.train.global_batch * one.job.train.sequence_length
            found += max(0, -(-(end - start) // step))
    return found
