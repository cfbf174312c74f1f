"""The job `rehearse`: a run at its true size without a GPU, before it is given a thousand of them.

For each layout of the run: one rank of each pipeline stage is built by Megatron's own classes on
torch's meta device, and what it allocates is held against what `check` counts; a small twin of the
layout takes a step on this machine, and the calls of its ranks to each other are compared; the
checkpoint that all ranks would write is laid out.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from hybrid_train.config.launcher import require_alone
from hybrid_train.jobs.help import console, show_numbers, table
from hybrid_train.jobs.run_plan import RunPlan
from hybrid_train.planning.agreement import bytes_by_kind, faults
from hybrid_train.planning.allocation import FILES_OF_ALL, Compared, stored_bytes
from hybrid_train.planning.degrees import data_parallel
from hybrid_train.planning.phases import PhaseSpan
from hybrid_train.planning.twin import in_words, twin_of
from hybrid_train.runtime import cpu
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.job_roots import RehearseJob
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted, show_bytes

_HEADS = ("", "rank", "pipeline rank", "as built", "check", "padding", "")


@dataclass(frozen=True)
class Twin:
    """What came of a step of a twin."""

    layout: str
    faults: list[str]
    calls: dict[str, tuple[int, int]]  # by kind: calls, bytes given; of all ranks together


@dataclass(frozen=True)
class Saved:
    """A checkpoint of all ranks."""

    files: int
    total: int  # bytes of weights and optimizer state
    largest: int  # bytes of the largest file, of the ranks that were built
    seconds: float | None  # at the rates that were stated


@dataclass(frozen=True)
class Rehearsal:
    """What was found of one layout."""

    phase: str
    layout: str
    ranks: list[Compared]
    twin: Twin | None
    saved: Saved

    @property
    def sound(self) -> bool:
        """Whether nothing was found that would stop a run."""
        return not any(one.difference for one in self.ranks) and not (
            self.twin and self.twin.faults
        )


def run(job: RehearseJob) -> int:
    """Rehearse each layout of the run; return 1 if anything differs, else 0.

    Raises:
        UserError: if a GPU is visible.
    """
    require_alone("rehearse")
    plan, page = RunPlan.of(job), console()
    start_logging()
    logging.getLogger("hybrid_train").setLevel(logging.WARNING)  # each rank would tell its plan
    cpu.install()
    # All twins go first: they are forked, and a fork must come before anything is computed.
    spans = list(_layouts(plan))
    twins = [_twin(one.job, plan.processes) if job.twin else None for one in spans]
    found = []
    for span, twin in zip(spans, twins, strict=True):
        found.append(rehearse(job, plan, span, twin))
        if not job.json:
            _show(page, found[-1], plan)
    if job.json:
        print(json.dumps(_as_data(found), indent=1, allow_nan=False))  # noqa: T201  the result
    return 0 if all(one.sound for one in found) else 1


def _layouts(plan: RunPlan) -> Iterator[PhaseSpan]:
    """Yield the first phase of each layout."""
    seen = []
    for one in plan.phases:
        if one.job.parallel not in seen:
            seen.append(one.job.parallel)
            yield one


def rehearse(job: RehearseJob, plan: RunPlan, span: PhaseSpan, twin: Twin | None) -> Rehearsal:
    """Build the ranks of one layout, and lay its checkpoint out."""
    # Megatron may be imported only now: its CUDA calls had to be redirected first.
    from hybrid_train.jobs.built_rank import build_rank

    stage = plan.processes // span.job.parallel.pipeline
    ranks = range(0, plan.processes, stage) if job.rank is None else [job.rank]
    built = [build_rank(span.job, plan.rows, rank, plan.processes) for rank in ranks]
    largest = max(one.saved for one in built)
    return Rehearsal(
        span.name,
        _layout_in_words(span.job, plan.processes),
        [figure for one in built for figure in one.figures],
        twin,
        _saved(job, span.job, plan, largest),
    )


def _twin(job: TrainJob, processes: int) -> Twin:
    from hybrid_train.jobs.twin_ranks import record

    found = record(job, processes)
    wrong = list(faults(found.calls, found.failures))
    wrong += [f"rank {rank}: {words}" for rank, words in found.failures.items()]
    return Twin(in_words(*twin_of(job, processes)), wrong, bytes_by_kind(found.calls))


def _saved(job: RehearseJob, own: TrainJob, plan: RunPlan, largest: int) -> Saved:
    total = stored_bytes(own, plan.rows)
    times = [
        amount / (rate * 1e9)
        for amount, rate in ((total, job.storage_gb_per_s), (largest, job.process_gb_per_s))
        if rate is not None
    ]
    files = plan.processes + len(FILES_OF_ALL)
    return Saved(files, total, largest, max(times, default=None))


def _layout_in_words(job: TrainJob, processes: int) -> str:
    plan = job.parallel
    return (
        f"tensor {plan.tensor} x pipeline {plan.pipeline} x context {plan.context} x data "
        f"{data_parallel(plan, processes):,}, expert {plan.expert}"
    )


def _show(page: Console, found: Rehearsal, plan: RunPlan) -> None:
    """Print what was found of one layout."""
    name = f" from phase {found.phase} on" if found.phase else ""
    page.print(f"\n{counted(plan.processes, 'process')}{name}: {found.layout}\n", soft_wrap=True)
    show_numbers(page, list(_rank_rows(found.ranks)), _HEADS)
    page.print(
        "\nBytes of one process. Padding: core lets tensors begin at multiples of 64 elements and "
        "cuts equal\nranges; of the optimizer, by how much this rank's range differs from an equal "
        "share for it.",
        soft_wrap=True,
    )
    page.print()
    page.print(table(_facts(found)))
    for fault in found.twin.faults if found.twin else ():
        page.print(f"  {fault}", soft_wrap=True)


def _rank_rows(ranks: Sequence[Compared]) -> Iterator[tuple[str, ...]]:
    for one in ranks:
        yield (
            one.what,
            f"{one.rank:,}",
            str(one.pipeline_rank),
            f"{one.built:,}",
            f"{one.counted:,}",
            f"{one.padding:,}",
            f"differs by {one.difference:+,}" if one.difference else "equal",
        )


def _facts(found: Rehearsal) -> Iterator[tuple[str, str]]:
    if found.twin is not None:
        yield "twin", found.twin.layout
        number = sum(calls for calls, _ in found.twin.calls.values())
        yield (
            "calls",
            f"{number:,} of its ranks to each other in a step; "
            + ("they differ:" if found.twin.faults else "all agree"),
        )
        yield (
            "bytes given",
            "; ".join(
                f"{kind} {show_bytes(given)} in {calls:,}"
                for kind, (calls, given) in found.twin.calls.items()
                if given
            ),
        )
        yield "", "of all ranks of the twin; `check` states no bytes of communication"
    saved = found.saved
    yield (
        "checkpoint",
        f"{show_bytes(saved.total)} in {saved.files:,} files: one of each process, "
        f"{len(FILES_OF_ALL)} of all; the largest of the ranks above {show_bytes(saved.largest)}",
    )
    if saved.seconds is None:
        yield "", "storage_gb_per_s=N of all processes, process_gb_per_s=N of each give its time"
    else:
        yield "", f"{saved.seconds:,.3g} s at the rates that were stated, nothing else counted"


def _as_data(found: Sequence[Rehearsal]) -> dict[str, Any]:
    """Return all as plain data, bytes and seconds."""
    layouts = []
    for one in found:
        data = asdict(one)
        for row, compared in zip(data["ranks"], one.ranks, strict=True):
            row["difference"] = compared.difference
        layouts.append(data)
    return {"problems": [], "sound": all(one.sound for one in found), "layouts": layouts}
