"""The phases of a run in tokens and steps, and the batch of each step, which may grow by a ramp.

All numbers are whole, and the same on every process. A phase ends at the first step that reaches
the start of the next one, and the batch of a step is that of the tokens seen before it. So the
position of a run, in tokens, says in which phase it is, how many of its sequences are done and how
large its batch is: there is nothing else to save.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hybrid_train.schema.data import Data, has_sources
from hybrid_train.schema.optimizer import Schedule
from hybrid_train.schema.train import BatchRamp, Phase, Train, TrainJob
from hybrid_train.schema.units import position, tokens

# Setting of a phase -> where it stands in a run.
PHASE_SETTINGS = {
    "blend": "data.blend",
    "sequence_length": "train.sequence_length",
    "microbatch": "train.microbatch",
    "global_batch": "train.global_batch",
    "tensor": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "context": "parallel.context",
    "expert": "parallel.expert",
}
# What must stay in a phase that has begun; a layout and a microbatch may change at any time.
FIXED_SETTINGS = ("blend", "sequence_length", "global_batch", "constant_lr", "precision_exceptions")

_VALIDATIONS, _VALIDATION_STEPS = 8, 100  # of a run, at least; steps between two, at most


@dataclass(frozen=True)
class RunLength:
    """What a run, or a part of it, takes until it has seen its tokens."""

    steps: int
    sequences: int


@dataclass(frozen=True)
class PhaseSpan:
    """One phase as it will run.

    Attributes:
        number: of the phase, from 0.
        name: of the phase; empty in a run without phases.
        job: the run with the settings of this phase.
        start: tokens before its first step.
        end: tokens after its last step.
        length: its steps and sequences.
        schedule: of the learning rate in this phase.
        rate_start: tokens before the phase that count in its schedule.
        rate_tokens: tokens of the whole run that count in its schedule.
    """

    number: int
    name: str
    job: TrainJob
    start: int
    end: int
    length: RunLength
    schedule: Schedule
    rate_start: int
    rate_tokens: int

    def sequences_before(self, tokens_seen: int) -> int:
        """Return how many sequences of this phase are done when the run has seen some tokens.

        A position that is not one of this run's own steps is rounded up.
        """
        return -(-(tokens_seen - self.start) // self.job.train.sequence_length)


def lay_out(job: TrainJob) -> list[PhaseSpan]:
    """Lay out the phases of a checked run; a run without any is one phase."""
    total, seen = tokens(job.train.tokens), 0
    jobs = list(jobs_of(job))
    phases = job.train.phases or [Phase(name="")]
    own_rate = [phase.constant_lr is not None for phase in phases]
    ends = [position(phase.start, total) for phase in phases[1:]] + [total]
    parts = []
    for phase_job, end in zip(jobs, ends, strict=True):
        length = run_length(phase_job.train, seen, end)
        reached = seen + length.sequences * phase_job.train.sequence_length
        parts.append((seen, reached, length))
        seen = reached
    # The schedule stands still in phases with a rate of their own.
    lengths = [end - start for start, end, _ in parts]
    counted = [0 if own else length for own, length in zip(own_rate, lengths, strict=True)]
    budget = min(total, total - seen + sum(counted))
    return [
        PhaseSpan(
            number=number,
            name=phases[number].name,
            job=jobs[number],
            start=start,
            end=end,
            length=length,
            schedule=jobs[number].schedule,
            rate_start=sum(counted[:number]),
            rate_tokens=budget,
        )
        for number, (start, end, length) in enumerate(parts)
    ]


def phase_at(phase_spans: Sequence[PhaseSpan], tokens_seen: int) -> PhaseSpan:
    """Return the phase of the step that starts after some tokens; at the end, the last one."""
    for phase_span in phase_spans:
        if tokens_seen < phase_span.end:
            return phase_span
    return phase_spans[-1]


def rows_of_step(phase_spans: Sequence[PhaseSpan], step: int) -> tuple[PhaseSpan, int, int] | None:
    """Return the phase of a step and the rows [first, last) of the phase that it takes.

    None if the run has no such step; the first is 1.
    """
    for phase_span in phase_spans:
        if 0 < step <= phase_span.length.steps:
            train, row = phase_span.job.train, 0
            for number in range(1, step + 1):
                seen = phase_span.start + row * train.sequence_length
                batch = global_batch(train, seen)
                if not ramps(train):
                    return phase_span, (step - 1) * batch, step * batch
                if number == step:
                    return phase_span, row, row + batch
                row += batch
        step -= phase_span.length.steps
    return None


def validation_interval(asked: int | None, phase_spans: Sequence[PhaseSpan]) -> int:
    """Return the steps between validations; 0: there is one at the end only.

    Where nothing is asked for, a run has at least five: every eighth of it, or every 100 steps.
    """
    if asked is not None:
        return asked
    steps = sum(phase_span.length.steps for phase_span in phase_spans)
    return max(1, min(_VALIDATION_STEPS, -(-steps // _VALIDATIONS)))


def scheduled_tokens(train: Train) -> int:
    """Return the tokens of a run outside of phases with a rate of their own, as they are asked."""
    total = tokens(train.tokens)
    starts = [position(phase.start, total) for phase in train.phases] + [total]
    own = sum(
        max(0, end - start)
        for phase, start, end in zip(train.phases, starts[:-1], starts[1:], strict=True)
        if phase.constant_lr is not None
    )
    return total - own


def jobs_of(job: TrainJob) -> Iterator[TrainJob]:
    """Yield the run as it is in each phase, without phases.

    A run without `data.sources` leaves the blends of its phases out, see `unread_sources`.
    """
    yield from map(copy.deepcopy, views_of(job))


def views_of(job: TrainJob) -> Iterator[TrainJob]:
    """Yield what `jobs_of` does, to look at alone: parts that do not change are those of the run.

    The checks look at thousands of them while they search for a legal value.
    """
    current = copy.copy(job)
    current.train = replace(job.train, phases=[])
    if not job.train.phases:
        yield current
    for number, phase in enumerate(job.train.phases):
        current = copy.copy(current)
        for section in ("train", "parallel", "data", "precision"):
            setattr(current, section, copy.copy(getattr(current, section)))
        if number:  # the checks see to it that the batch has grown by then
            current.train.batch_ramp = BatchRamp()
        for name, path in PHASE_SETTINGS.items():
            value = getattr(phase, name)
            if name == "blend" and not has_sources(job.data):
                continue
            if value:
                section, key = path.split(".")
                setattr(getattr(current, section), key, value)
        if phase.precision_exceptions is not None:
            current.precision.exceptions = [*phase.precision_exceptions, *job.precision.exceptions]
        current.schedule = job.schedule
        if phase.constant_lr is not None:
            current.schedule = Schedule(peak_lr=phase.constant_lr)
        yield current


def unread_sources(data: Data, phases: Sequence[Phase]) -> list[str]:
    """Return the sources that the phases name although the run has none to choose from.

    So an experiment states its blends, and can be tried on any data there is.
    """
    if has_sources(data):
        return []
    return list(dict.fromkeys(name for phase in phases for name in phase.blend))


def run_length(train: Train, start: int = 0, end: int | None = None) -> RunLength:
    """Count steps and sequences between two positions in tokens; by default of the whole run.

    The first step that reaches the end is the last.
    """
    end = tokens(train.tokens) if end is None else end
    seen, steps = start, 0
    for batch, stage_end in _ramp_stages(train):
        step = batch * train.sequence_length
        stop = end if stage_end is None else min(stage_end, end)
        taken = max(0, -(-(stop - seen) // step))
        seen, steps = seen + taken * step, steps + taken
    return RunLength(steps, (seen - start) // train.sequence_length)


def global_batch(train: Train, tokens_seen: int) -> int:
    """Return the sequences of the step that starts after `tokens_seen` tokens.

        start_batch + increment * floor(tokens_seen * n / ramp tokens)

    up to `global_batch`, with n = (global_batch - start_batch) / increment stages of equal length.
    Source: `--rampup-batch-size` of Megatron-LM, which counts sequences; core 0.19.2 has the stages
    one by one (num_microbatches_calculator.py).
    """
    ramp, length = train.batch_ramp, tokens(train.batch_ramp.tokens)
    if tokens_seen >= length:
        return train.global_batch
    stages = (train.global_batch - ramp.start_batch) // ramp.increment
    return ramp.start_batch + ramp.increment * (tokens_seen * stages // length)


def ramps(train: Train) -> bool:
    """Tell whether the batch grows by a ramp."""
    return tokens(train.batch_ramp.tokens) > 0


def _ramp_stages(train: Train) -> Iterator[tuple[int, int | None]]:
    """Yield the batch of each stage of the ramp, and the tokens at which the next one begins.

    None begins after the last.
    """
    length = tokens(train.batch_ramp.tokens)
    if length:
        ramp = train.batch_ramp
        number = (train.global_batch - ramp.start_batch) // ramp.increment
        for stage in range(number):
            yield ramp.start_batch + stage * ramp.increment, -(-(stage + 1) * length // number)
    yield train.global_batch, None
