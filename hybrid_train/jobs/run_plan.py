"""The plan of a training run as `check` shows it: laid out for its processes, phase by phase."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rich.console import Console

from hybrid_train.anatomy import counts
from hybrid_train.anatomy.gemm_formats import formats_of
from hybrid_train.config import rules_of_cluster
from hybrid_train.config.rules_of_hardware import card_of
from hybrid_train.config.rules_of_precision import is_native
from hybrid_train.config.suggestions import processes_of
from hybrid_train.jobs.help import show_numbers
from hybrid_train.jobs.teacher_plan import TeacherPlan, plan_teachers
from hybrid_train.planning import degrees, stages
from hybrid_train.planning.memory import Memory, memory
from hybrid_train.planning.phases import PhaseSpan, lay_out, run_length
from hybrid_train.planning.stages import Stage
from hybrid_train.schema.cluster import Cluster
from hybrid_train.schema.hardware import Card
from hybrid_train.schema.job_roots import CheckJob
from hybrid_train.schema.optimizer import Wsd
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import show_bytes, show_tokens, tokens

_PHASE_HEADS = (
    "phase", "start", "tokens", "steps", "sequence", "batch", "rate", "most kept", "layout",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedPeak:
    """What one process can do at most, and where the figure comes from."""

    tflops: float
    source: str


@dataclass(frozen=True)
class RunPlan:
    """A checked run, laid out for the processes that it will have.

    Attributes:
        job: the run.
        processes: on all machines together.
        rows: of the embedding as they are stored.
        phases: of the run; a run without any is one.
        stages: of the pipeline in the first phase, in the order of the model.
    """

    job: CheckJob
    processes: int
    rows: int
    phases: Sequence[PhaseSpan]
    stages: Sequence[Stage]

    @classmethod
    def of(cls, job: CheckJob) -> "RunPlan":
        """Lay out a run that has passed the checks."""
        phases = lay_out(job)
        rows = rules_of_cluster.vocab_rows(job) or _rows_of_tokenizer(job)
        return cls(job, processes_of(job, 1), rows, phases, stages.stages(phases[0].job, rows))

    @property
    def first(self) -> TrainJob:
        """The run with the settings of its first phase."""
        return self.phases[0].job

    @property
    def data_parallel(self) -> int:
        """Groups of processes that read different sequences, in the first phase."""
        return degrees.data_parallel(self.first.parallel, self.processes)

    @property
    def microbatches(self) -> int:
        """Microbatches of a step of one data-parallel rank, in the first phase."""
        return degrees.num_microbatches(self.first, self.processes)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all processes, in the first phase."""
        return self.first.train.global_batch * self.first.train.sequence_length

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return sum(one.length.steps for one in self.phases)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        warmup = self.job.schedule.warmup_tokens
        if not tokens(warmup):
            return 0
        return run_length(replace(self.first.train, tokens=warmup)).steps

    @property
    def decay_tokens(self) -> int:
        """Tokens in which the learning rate falls; 0 for a schedule that falls all the time."""
        schedule = self.job.schedule
        return tokens(schedule.decay_tokens) if isinstance(schedule, Wsd) else 0

    @cached_property
    def flops_per_token(self) -> list[counts.FlopCount]:
        """Operations of a token, in each phase."""
        return [
            counts.flops_per_token(self.job.model, self.rows, one.job.train.sequence_length)
            for one in self.phases
        ]

    @property
    def flops(self) -> int:
        """Operations of the whole run, with those of teachers ahead of it."""
        of_phases = zip(self.flops_per_token, self.taught.flops, self.phases, strict=True)
        return sum(
            (each.training + ahead) * (one.end - one.start) for each, ahead, one in of_phases
        )

    @property
    def flops_of_a_step(self) -> float:
        """Operations of a step and process, in the first phase, with those of teachers."""
        of_a_token = self.flops_per_token[0].training + self.taught.flops[0]
        return of_a_token * self.tokens_per_step / self.processes

    @cached_property
    def card(self) -> Card | None:
        """The GPUs of the cluster; None where it does not say."""
        return card_of(self.job)

    @property
    def peak(self) -> PlannedPeak | None:
        """What a process can do at most: the figure of the user, else of the card; None: unknown.

        The card's is that of the fastest format of the run, so that no run is faster than it says.
        """
        if self.job.runtime.peak_tflops is not None:
            return PlannedPeak(self.job.runtime.peak_tflops, "runtime.peak_tflops")
        if self.card is None:
            return None
        each = {format: self.card.peak_of(format) for format in self._multiplied()}
        known = {format: peak for format, peak in each.items() if peak is not None}
        if len(known) < len(each):
            return None
        fastest = max(known, key=lambda format: known[format])
        return PlannedPeak(known[fastest], f"{fastest.value}, {self.card.title}")

    def _multiplied(self) -> set[GemmFormat]:
        """Return the formats that the hardware multiplies in any phase; bfloat16 is always one."""
        found = {GemmFormat.bf16}
        for one in self.phases if is_native(self.job) else ():
            of_layers = formats_of(one.job.model, one.job.precision).values()
            found |= {format for layer in of_layers for format in layer.formats.values()}
        return found

    def least_seconds(self) -> tuple[float, float] | None:
        """Return the time of a step and of the run at the whole peak; None for a peak unknown."""
        of_run = self.seconds_of(self.flops)
        of_step = self.seconds_of(self.flops_of_a_step * self.processes)
        return None if of_step is None or of_run is None else (of_step, of_run)

    def seconds_of(self, flops: float) -> float | None:
        """Return how long operations take that all processes share, at the whole peak."""
        return None if self.peak is None else flops / self.processes / (self.peak.tflops * 1e12)

    def kept_of_rank(self, rank: int) -> Memory:
        """Return what a process of a pipeline rank keeps from step to step, in the first phase."""
        return memory(self.first, stages.held_of_rank(self.stages, rank), self.processes)

    @cached_property
    def taught(self) -> TeacherPlan:
        """What teachers take beside the model."""
        return plan_teachers(self.job, self.phases, self.rows, self.processes)

    def cost_of_rank(self, rank: int) -> float:
        """Return the work of a pipeline rank as a part of the mean."""
        own = [stage.cost for stage in self.stages if stage.rank == rank]
        return sum(own) / len(own)

    def most_kept(self) -> int:
        """Return the bytes that the fullest process keeps, in any phase, teachers included."""
        each = (stages.most_kept(one.job, self.processes, self.rows) for one in self.phases)
        return max(each) + sum(one.weights + one.slots for one in self.taught.teachers)

    def most_hosted(self) -> int:
        """Return the bytes in host memory of the process with most, in the first phase."""
        return max(self.kept_of_rank(rank).host for rank in range(self.first.parallel.pipeline))

    def nodes(self) -> tuple[Cluster, int] | None:
        """Return the cluster and the number of its nodes that the run takes; None without one."""
        cluster = self.job.cluster
        if cluster is None:
            return None
        return cluster, rules_of_cluster.nodes_of(self.job, self.processes)


def _rows_of_tokenizer(job: CheckJob) -> int:
    from hybrid_train.data.sources import tokenizer_of  # few plans need it

    return degrees.padded_vocab_size(tokenizer_of(job.data).vocab_size, job.model.vocab_multiple)


def show_phases(page: Console, plan: RunPlan) -> None:
    """Print a row for each phase."""
    page.print()
    show_numbers(page, list(_phase_rows(plan)), _PHASE_HEADS)
    page.print(
        "\nBatch: sequences of a step. Rate: constant, where a phase is not in the schedule. Most "
        "kept: by the\nprocess that keeps most. Layout: where it is not that of the first phase.",
        soft_wrap=True,
    )


def _phase_rows(plan: RunPlan) -> Iterator[tuple[str, ...]]:
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


def decay_steps(phases: Sequence[PhaseSpan], decay: int) -> int:
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
