"""The plan of a training run: what the tables of `check`, and its JSON, are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hybrid_train.anatomy import counts
from hybrid_train.config import check_cluster
from hybrid_train.config.mending import processes_of
from hybrid_train.planning import degrees, stages
from hybrid_train.planning.memory import Memory, memory
from hybrid_train.planning.phases import Stretch, lay_out
from hybrid_train.planning.ramp import run_length
from hybrid_train.planning.stages import Stage
from hybrid_train.schema.check import CheckJob
from hybrid_train.schema.cluster import Cluster
from hybrid_train.schema.schedule import Wsd
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import tokens


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
    phases: Sequence[Stretch]
    stages: Sequence[Stage]

    @classmethod
    def of(cls, job: CheckJob) -> "RunPlan":
        """Lay out a run that has passed the checks."""
        phases = lay_out(job)
        rows = check_cluster.vocab_rows(job) or _rows_of_tokenizer(job)
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
        """Operations of the whole run."""
        of_phases = zip(self.flops_per_token, self.phases, strict=True)
        return sum(each.training * (one.end - one.start) for each, one in of_phases)

    @property
    def flops_of_a_step(self) -> float:
        """Operations of a step and process, in the first phase."""
        return self.flops_per_token[0].training * self.tokens_per_step / self.processes

    def least_seconds(self) -> tuple[float, float] | None:
        """Return the time of a step and of the run at the whole peak; None for a peak unknown."""
        peak = self.job.runtime.peak_tflops
        if peak is None:
            return None
        return self.flops_of_a_step / (peak * 1e12), self.flops / self.processes / (peak * 1e12)

    def kept_of_rank(self, rank: int) -> Memory:
        """Return what a process of a pipeline rank keeps from step to step, in the first phase."""
        return memory(self.first, stages.held_of_rank(self.stages, rank), self.processes)

    def cost_of_rank(self, rank: int) -> float:
        """Return the work of a pipeline rank as a part of the mean."""
        own = [stage.cost for stage in self.stages if stage.rank == rank]
        return sum(own) / len(own)

    def most_kept(self) -> int:
        """Return the bytes that the fullest process keeps, in any phase."""
        each = (stages.most_kept(one.job, self.processes, self.rows) for one in self.phases)
        return max(each)

    def nodes(self) -> tuple[Cluster, int] | None:
        """Return the cluster and the number of its nodes that the run takes; None without one."""
        cluster = self.job.cluster
        if cluster is None:
            return None
        return cluster, check_cluster.nodes_of(self.job, self.processes)


def _rows_of_tokenizer(job: CheckJob) -> int:
    from hybrid_train.data.sources import tokenizer_of  # few plans need it

    return degrees.padded_vocab_size(tokenizer_of(job.data).vocab_size, job.model.vocab_multiple)
