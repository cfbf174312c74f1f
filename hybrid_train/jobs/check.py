"""The job `check`: the plan of a training run, for as many processes as it will have.

It needs neither those processes nor torch: all that is printed follows from the config.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hybrid_train.config import degrees
from hybrid_train.config.check_files import data_is_chosen
from hybrid_train.config.compose import world_size
from hybrid_train.config.pattern import parse
from hybrid_train.config.problems import UserError
from hybrid_train.config.ramp import ramps, run_length
from hybrid_train.config.schema.check import CheckJob
from hybrid_train.config.schema.data import Quickstart
from hybrid_train.config.schema.schedule import Wsd
from hybrid_train.config.schema.train import Train
from hybrid_train.config.units import show_bytes, show_tokens, tokens
from hybrid_train.jobs.count import layers_in_words
from hybrid_train.jobs.help import console, show_numbers, table
from hybrid_train.model import counts, stages
from hybrid_train.model.memory import Held, memory
from hybrid_train.model.stages import Stage
from hybrid_train.tracking.metrics import show_duration, show_step_time

_STAGE_HEADS = ("stage", "pipeline rank", "cost", "parameters")
_HELD_HEADS = (
    "pipeline rank", "cost", "parameters", "weights", "gradients", "optimizer", "kept",
)  # fmt: skip


def run(job: CheckJob) -> None:
    """Print what every process will do and hold, and what is still to be set."""
    if world_size() > 1:
        raise UserError("check runs in one process; start it without torchrun: processes=N")
    rows = degrees.padded_vocab_size(_vocab_size(job), job.model.vocab_multiple)
    planned = stages.stages(job, rows)
    page = console()
    page.print(table(_facts(job, rows, planned)))
    if len(planned) > 1:
        page.print(f"\n{stages.cut(job, rows)}\n", soft_wrap=True)
        show_numbers(page, list(_stage_rows(planned)), _STAGE_HEADS)
    page.print()
    show_numbers(page, list(_held_rows(job, planned)), _HELD_HEADS)
    page.print(
        "\nCost: forward FLOPs, as a part of the mean. Parameters and bytes: of one process, kept "
        "from step to\nstep. Not known here: activations, buffers of libraries, how much memory a "
        "GPU has.",
        soft_wrap=True,
    )
    unset = list(data_is_chosen(job))
    if unset:
        page.print("\nStill to be set; the plan does not depend on it, but `train` will ask:")
        page.print(table((f"  {problem.path}", problem.rule) for problem in unset))


def _vocab_size(job: CheckJob) -> int:
    if job.model.vocab_size is not None:
        return job.model.vocab_size
    if isinstance(job.data, Quickstart):
        return job.data.vocab_size
    assert job.data.tokenizer is not None, "the checks ask for it"
    from hybrid_train.data.tokenizers import Tokenizer  # few plans need it

    return Tokenizer.load(job.data.tokenizer).vocab_size


def _facts(job: CheckJob, rows: int, planned: Sequence[Stage]) -> Iterator[tuple[str, str]]:
    """Yield the lines above the tables: a word, then what the plan says of it."""
    model, pattern = job.model, parse(job.model.pattern)
    size = counts.parameters(model, rows)
    yield (
        "model",
        f"{show_tokens(size.total)} parameters, {show_tokens(size.active)} active; layers "
        f"{layers_in_words(pattern)}; vocabulary {rows:,}; {job.precision.format.value}",
    )
    plan = job.parallel
    data = degrees.data_parallel(plan, job.processes)
    yield (
        "processes",
        f"{job.processes:,} = tensor {plan.tensor} x pipeline {plan.pipeline} x context "
        f"{plan.context} x data {data:,}",
    )
    if pattern.count("E"):
        copies = degrees.expert_data_parallel(plan, job.processes)
        yield (
            "experts",
            f"{model.moe.experts:,} = expert {plan.expert} x {model.moe.experts // plan.expert} a "
            f"process; expert_tensor {degrees.expert_tensor(plan)}, expert-data {copies:,}",
        )
    length = job.train.sequence_length
    yield "sequence", f"{length:,} tokens{_sequence_split(job)}"
    number = degrees.num_microbatches(job, job.processes)
    per_step = job.train.global_batch * length
    yield (
        "batch",
        f"{job.train.global_batch:,} sequences = data {data:,} x microbatch "
        f"{job.train.microbatch} x {number:,} microbatches; {show_tokens(per_step)} tokens a step"
        f"{_growth(job.train)}",
    )
    yield "length", _length(job, per_step)
    yield from _work(job, rows, per_step)
    if plan.pipeline > 1:
        yield "pipeline", _pipeline(job, planned, number)


def _growth(train: Train) -> str:
    """Say how the batch grows at the start of the run."""
    if not ramps(train):
        return ""
    ramp = train.batch_ramp
    return f"; grows from {ramp.start_batch} by {ramp.increment} over {ramp.tokens} tokens"


def _sequence_split(job: CheckJob) -> str:
    """Say how many tokens of a sequence a process has, in all layers and between them."""
    plan, length = job.parallel, job.train.sequence_length
    share, words = length // plan.context, ""
    if plan.context > 1:
        words = f"; {share:,} on each context rank"
    if degrees.splits_sequence(plan):
        words += f"; {share // plan.tensor:,} on each tensor rank between layers"
    return words


def _length(job: CheckJob, per_step: int) -> str:
    """Say how many steps the run and its phases take."""
    train, warmup = job.train, job.schedule.warmup_tokens
    words = [f"{train.tokens} tokens = {run_length(train).steps:,} steps"]
    if tokens(warmup):
        steps = run_length(replace(train, tokens=warmup)).steps
        words.append(f"warm-up {show_tokens(tokens(warmup))} = {steps:,}")
    if isinstance(job.schedule, Wsd) and tokens(job.schedule.decay_tokens):
        decay = tokens(job.schedule.decay_tokens)
        words.append(f"decay {show_tokens(decay)} = {math.ceil(decay / per_step):,}")
    return "; ".join(words)


def _work(job: CheckJob, rows: int, per_step: int) -> Iterator[tuple[str, str]]:
    """Say how many operations the run takes, and the time below which it cannot be."""
    of_token = counts.flops_per_token(job.model, rows, job.train.sequence_length).training
    of_process = of_token * per_step / job.processes
    num_tokens = run_length(job.train).sequences * job.train.sequence_length
    yield (
        "work",
        f"{of_token * num_tokens:.3g} FLOP in all, "
        f"{of_process / 1e12:.4g} TFLOP a step and process",
    )
    peak = job.runtime.peak_tflops
    if peak is None:
        yield "time", "not known here; with runtime.peak_tflops=N of a GPU, the least it can be"
    else:
        step_s = of_process / (peak * 1e12)
        yield (
            "time",
            f"more than {show_step_time(step_s)} a step and "
            f"{show_duration(step_s * num_tokens / per_step)} in all, which would be the whole "
            f"peak of {peak:g} TFLOP/s",
        )


def _pipeline(job: CheckJob, planned: Sequence[Stage], num_microbatches: int) -> str:
    """Say how much of the time the ranks wait for each other."""
    plan = job.parallel
    bubble = stages.bubble_share(plan.pipeline, plan.virtual_pipeline, num_microbatches)
    work = stages.most_work_share(planned, num_microbatches)
    each = f", {plan.virtual_pipeline} stages each" if plan.virtual_pipeline > 1 else ""
    return (
        f"{plan.pipeline} ranks{each}; they would wait {bubble:.1%} of a step if all stages cost "
        f"the same; with these {1 - work:.1%} or more"
    )


def _stage_rows(planned: Sequence[Stage]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each stage, in the order of the model."""
    width = len(str(len(planned) - 1))
    for number, stage in enumerate(planned):
        yield (
            f"{number:{width}}  {stage.contents}",
            str(stage.rank),
            f"{stage.cost:.2f}",
            show_tokens(stage.held.total),
        )


def _held_rows(job: CheckJob, planned: Sequence[Stage]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each pipeline rank: what one process of it does and keeps."""
    for rank in range(job.parallel.pipeline):
        own = [stage for stage in planned if stage.rank == rank]
        held = sum((stage.held for stage in own), Held(0))
        kept = memory(job, held, job.processes)
        parts = (kept.weights, kept.gradients, kept.optimizer, kept.total)
        yield (
            str(rank),
            f"{sum(stage.cost for stage in own) / len(own):.2f}",
            show_tokens(held.total),
            *map(show_bytes, parts),
        )
