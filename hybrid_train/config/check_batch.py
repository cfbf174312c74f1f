"""Rules of lengths: of sequences, batches and their growth, and of the schedule.

Where a comment names a file, it is one of Megatron-Core 0.19.2.
"""

import math
from collections.abc import Iterator

from hybrid_train.planning import degrees
from hybrid_train.planning.degrees import splits_sequence
from hybrid_train.planning.phases import scheduled_tokens
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.schedule import Wsd
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import is_position, is_tokens, show_tokens, tokens


def _sequence_is_split_evenly(job: TrainJob, _: int) -> Iterator[Problem]:
    plan, length = job.parallel, job.train.sequence_length
    # Each context rank takes one early and one late piece, so that causal work is equal.
    pieces = 2 * plan.context if plan.context > 1 else 1
    if splits_sequence(plan):
        pieces = math.lcm(pieces, plan.context * plan.tensor)
    if length % pieces:
        rule = f"must be a multiple of {pieces} to split along the sequence"
        nearest = degrees.nearest_multiple(length, pieces)
        yield Problem("train.sequence_length", length, rule, nearest, unit=pieces)


def _mtp_has_tokens_to_predict(job: TrainJob, _: int) -> Iterator[Problem]:
    depths, length = parse(job.model.pattern).mtp_depths, job.train.sequence_length
    if depths and length <= depths:
        rule = f"must be longer than the {depths} MTP depths of the pattern"
        yield Problem("train.sequence_length", length, rule)


def _shares_of_a_batch(job: TrainJob, world_size: int) -> tuple[int, str]:
    """Return how many shares a batch has, each of whole microbatches, and why in words."""
    plan = job.parallel
    # A wrong number of processes is reported as such; here the nearest legal one counts.
    processes = degrees.nearest_multiple(world_size, degrees.processes_unit(plan))
    shares = degrees.data_parallel(plan, processes)
    ranks = f"{shares} data-parallel ranks"
    if plan.virtual_pipeline == 1:
        return shares, ranks
    # pipeline_parallel/schedules.py 1145, interleaved groups
    return shares * plan.pipeline, f"{ranks} x {plan.pipeline} pipeline stages"


def _batch_is_whole_microbatches(job: TrainJob, world_size: int) -> Iterator[Problem]:
    train = job.train
    unit, ranks = _shares_of_a_batch(job, world_size)
    per_rank, rest = divmod(train.global_batch, unit)
    if rest or not per_rank:
        rule = f"must be a multiple of {train.microbatch} (train.microbatch) x {ranks}"
        whole = unit * train.microbatch
        nearest = degrees.nearest_multiple(train.global_batch, whole)
        beside = ("train.microbatch",)
        yield Problem("train.global_batch", train.global_batch, rule, nearest, whole, beside)
    elif per_rank % train.microbatch:
        rule = f"must divide {per_rank}, the share of train.global_batch of {ranks}"
        yield Problem("train.microbatch", train.microbatch, rule, beside=("train.global_batch",))


def _batch_ramp_reaches_the_batch(job: TrainJob, world_size: int) -> Iterator[Problem]:
    train, ramp = job.train, job.train.batch_ramp
    if not all(map(is_tokens, (train.tokens, ramp.tokens))) or not tokens(ramp.tokens):
        return
    if tokens(ramp.tokens) > tokens(train.tokens):
        rule = f"must not exceed train.tokens ({train.tokens})"
        yield Problem("train.batch_ramp.tokens", ramp.tokens, rule, train.tokens)
    shares, ranks = _shares_of_a_batch(job, world_size)
    unit = shares * train.microbatch
    if train.global_batch <= unit:
        rule = f"leaves no batch below train.global_batch ({train.global_batch}); needs more than "
        rule += f"{train.microbatch} (train.microbatch) x {ranks}"
        yield Problem("train.batch_ramp.tokens", ramp.tokens, rule, "0")
        return
    uneven = [name for name in ("start_batch", "increment") if getattr(ramp, name) % unit]
    for name in uneven:
        size = getattr(ramp, name)
        rule = f"must be a multiple of {train.microbatch} (train.microbatch) x {ranks}"
        nearest = degrees.nearest_multiple(size, unit)
        yield Problem(f"train.batch_ramp.{name}", size, rule, nearest, unit=unit)
    room = train.global_batch - ramp.start_batch
    if uneven:
        return
    if room <= 0:
        rule = f"must be less than train.global_batch ({train.global_batch})"
        legal = (train.global_batch - 1) // unit * unit
        yield Problem("train.batch_ramp.start_batch", ramp.start_batch, rule, legal)
    elif room % ramp.increment:
        rule = f"must divide the {room} sequences from start_batch to train.global_batch"
        fits = [step for step in range(1, room + 1) if not room % step and not step % unit]
        near = min(fits or [room], key=lambda step: abs(step - ramp.increment))
        yield Problem("train.batch_ramp.increment", ramp.increment, rule, near)


def _schedule_fits_the_run(job: TrainJob, _: int) -> Iterator[Problem]:
    decay = job.schedule.decay_tokens if isinstance(job.schedule, Wsd) else "0"
    if not all(map(is_tokens, (job.train.tokens, job.schedule.warmup_tokens, decay))):
        return  # reported where they stand
    if not all(is_position(phase.start) for phase in job.train.phases):
        return
    room = scheduled_tokens(job)
    whole = f"train.tokens ({job.train.tokens})"
    if room != tokens(job.train.tokens):
        whole = f"the {show_tokens(room)} tokens of phases without constant_lr"
    warmup = job.schedule.warmup_tokens
    if tokens(warmup) > room:
        rule = f"must not exceed {whole}"
        yield Problem("schedule.warmup_tokens", warmup, rule, str(max(0, room - tokens(decay))))
        room = tokens(decay) if tokens(decay) <= room else room
    else:
        room -= tokens(warmup)
    if tokens(decay) > room:
        rule = f"and warm-up ({warmup}) must fit into {whole}"
        yield Problem("schedule.decay_tokens", decay, rule, str(room))


# The rules that depend on the number of processes, beside that the degrees divide it.
SHARE_RULES = (_batch_is_whole_microbatches, _batch_ramp_reaches_the_batch)
BATCH_RULES = (
    _sequence_is_split_evenly,
    _mtp_has_tokens_to_predict,
    *SHARE_RULES,
    _schedule_fits_the_run,
)
