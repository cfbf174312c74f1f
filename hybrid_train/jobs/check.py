"""The job `check`: the plan of a training run, for as many processes as it will have.

It needs neither those processes nor torch: all that is printed follows from the config.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console

from hybrid_train.anatomy import counts, format_table
from hybrid_train.anatomy.layers import distinct
from hybrid_train.anatomy.product_formats import formats_of, kept_in_words, quantizes
from hybrid_train.config.check_files import data_is_chosen
from hybrid_train.config.check_native import hardware_notes
from hybrid_train.config.launcher import require_alone
from hybrid_train.jobs.count import layers_in_words
from hybrid_train.jobs.help import console, show_numbers, table
from hybrid_train.jobs.phase_table import decay_steps, show_phases
from hybrid_train.planning import degrees, stages
from hybrid_train.planning.memory import memory
from hybrid_train.planning.phases import Stretch, lay_out, unread_sources
from hybrid_train.planning.ramp import ramps, run_length
from hybrid_train.planning.stages import Stage
from hybrid_train.schema.check import CheckJob
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.model import Moe
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.schedule import Wsd
from hybrid_train.schema.train import Train, TrainJob
from hybrid_train.schema.units import show_bytes, show_tokens, tokens
from hybrid_train.tracking.metrics import show_duration, show_step_time

_STAGE_HEADS = ("stage", "pipeline rank", "cost", "parameters")
_HELD_HEADS = (
    "pipeline rank", "cost", "parameters", "weights", "gradients", "optimizer", "kept",
)  # fmt: skip


def run(job: CheckJob) -> None:
    """Print what every process will do and hold, and what is still to be set."""
    require_alone("check")
    rows = degrees.padded_vocab_size(_vocab_size(job), job.model.vocab_multiple)
    phases = lay_out(job)
    first = phases[0].job
    planned = stages.stages(first, rows)
    page = console()
    page.print(table(_facts(job, phases, rows, planned)))
    if len(planned) > 1:
        page.print(f"\n{stages.cut(first, rows)}\n", soft_wrap=True)
        show_numbers(page, list(_stage_rows(planned)), _STAGE_HEADS)
    page.print()
    show_numbers(page, list(_held_rows(first, job.processes, planned)), _HELD_HEADS)
    page.print(
        "\nCost: forward FLOPs, as a part of the mean. Parameters and bytes: of one process, kept "
        "from step to\nstep. Not known here: activations, buffers of libraries, how much memory a "
        "GPU has.",
        soft_wrap=True,
    )
    if len(phases) > 1:
        show_phases(page, job, phases, rows)
    _show_formats(page, phases)
    if unread := unread_sources(job):
        page.print(
            f"\nThe phases name sources ({', '.join(unread)}). Without data.sources all phases "
            "read the same data."
        )
    if notes := hardware_notes(job):
        page.print("\nEmulated this runs; a GPU that computes quantized products would refuse it:")
        for note in notes:
            page.print(f"  {note}", soft_wrap=True, highlight=False, markup=False)
    unset = list(data_is_chosen(job))
    if unset:
        page.print("\nStill to be set; the plan does not depend on it, but `train` will ask:")
        page.print(table((f"  {problem.path}", problem.rule) for problem in unset))


def _show_formats(page: Console, phases: Sequence[Stretch]) -> None:
    """Print which layers multiply in which format, where any phase quantizes; again if it changes.

    Args:
        page: where to print.
        phases: of the run, laid out.
    """
    if not any(quantizes(one.job.model, one.job.precision) for one in phases):
        return
    shown = None
    for phase in phases:
        precision = phase.job.precision
        if precision == shown:
            continue
        formats = formats_of(phase.job.model, precision)
        of_phase = "" if shown is None else f" from phase {phase.name} on"
        page.print(
            f"\nFormats of the matrix products{of_phase}; all else is {precision.base.value}",
            soft_wrap=True,
        )
        for line in format_table.lines(formats, precision.exceptions):
            page.print(line, soft_wrap=True, highlight=False)
        if kept := kept_in_words(phase.job.model, precision):
            page.print(f"FP8 parameters: {kept}", soft_wrap=True, highlight=False)
        shown = precision


def _vocab_size(job: CheckJob) -> int:
    if job.model.vocab_size is not None:
        return job.model.vocab_size
    if isinstance(job.data, Quickstart):
        return job.data.vocab_size
    from hybrid_train.data.sources import tokenizer_of  # few plans need it

    return tokenizer_of(job.data).vocab_size


def _facts(
    job: CheckJob, phases: Sequence[Stretch], rows: int, planned: Sequence[Stage]
) -> Iterator[tuple[str, str]]:
    """Yield the lines above the tables: a word, then what the plan says of it."""
    model, pattern = job.model, parse(job.model.pattern)
    if len(phases) > 1:
        yield (
            "phases",
            f"{len(phases)}, in the table at the end; all before it is of phase {phases[0].name}, "
            "but length, work and the time in all, which are of the run",
        )
    size = counts.parameters(model, rows)
    yield (
        "model",
        f"{show_tokens(size.total)} parameters, {show_tokens(size.active)} active; layers "
        f"{layers_in_words(pattern)}; vocabulary {rows:,}; {job.precision.format.value}",
    )
    first = phases[0].job
    train, plan = first.train, first.parallel
    data = degrees.data_parallel(plan, job.processes)
    yield (
        "processes",
        f"{job.processes:,} = tensor {plan.tensor} x pipeline {plan.pipeline} x context "
        f"{plan.context} x data {data:,}",
    )
    if numbers := [one.sizes.experts for one in distinct(model) if one.letter == Moe.letter]:
        copies = degrees.expert_data_parallel(plan, job.processes)
        split = (f"{one:,} = expert {plan.expert} x {one // plan.expert}" for one in set(numbers))
        yield (
            "experts",
            f"{' or '.join(sorted(split))} a process; expert_tensor "
            f"{degrees.expert_tensor(plan)}, expert-data {copies:,}",
        )
    yield "sequence", f"{train.sequence_length:,} tokens{_sequence_split(first)}"
    number = degrees.num_microbatches(first, job.processes)
    per_step = train.global_batch * train.sequence_length
    yield (
        "batch",
        f"{train.global_batch:,} sequences = data {data:,} x microbatch "
        f"{train.microbatch} x {number:,} microbatches; {show_tokens(per_step)} tokens a step"
        f"{_growth(train)}",
    )
    yield "length", _length(job, phases)
    yield from _work(job, phases, rows, per_step)
    if plan.pipeline > 1:
        yield "pipeline", _pipeline(first, planned, number)


def _growth(train: Train) -> str:
    """Say how the batch grows at the start of the run."""
    if not ramps(train):
        return ""
    ramp = train.batch_ramp
    return f"; grows from {ramp.start_batch} by {ramp.increment} over {ramp.tokens} tokens"


def _sequence_split(job: TrainJob) -> str:
    """Say how many tokens of a sequence a process has, in all layers and between them."""
    plan, length = job.parallel, job.train.sequence_length
    share, words = length // plan.context, ""
    if plan.context > 1:
        words = f"; {share:,} on each context rank"
    if degrees.splits_sequence(plan):
        words += f"; {share // plan.tensor:,} on each tensor rank between layers"
    return words


def _length(job: CheckJob, phases: Sequence[Stretch]) -> str:
    """Say how many steps the run takes, and the parts of its schedule."""
    warmup = job.schedule.warmup_tokens
    words = [f"{job.train.tokens} tokens = {sum(one.length.steps for one in phases):,} steps"]
    if tokens(warmup):
        steps = run_length(replace(phases[0].job.train, tokens=warmup)).steps
        words.append(f"warm-up {show_tokens(tokens(warmup))} = {steps:,}")
    if isinstance(job.schedule, Wsd) and tokens(job.schedule.decay_tokens):
        decay = tokens(job.schedule.decay_tokens)
        words.append(f"decay {show_tokens(decay)} = {decay_steps(phases, decay):,}")
    return "; ".join(words)


def _work(
    job: CheckJob, phases: Sequence[Stretch], rows: int, per_step: int
) -> Iterator[tuple[str, str]]:
    """Say how many operations the run takes, and the time below which it cannot be."""
    of_token = [
        counts.flops_per_token(job.model, rows, one.job.train.sequence_length).training
        for one in phases
    ]
    of_process = of_token[0] * per_step / job.processes
    in_all = sum(each * (one.end - one.start) for each, one in zip(of_token, phases, strict=True))
    yield (
        "work",
        f"{in_all:.3g} FLOP in all, {of_process / 1e12:.4g} TFLOP a step and process",
    )
    peak = job.runtime.peak_tflops
    if peak is None:
        yield "time", "not known here; with runtime.peak_tflops=N of a GPU, the least it can be"
    else:
        step_s = of_process / (peak * 1e12)
        in_all_s = in_all / job.processes / (peak * 1e12)
        yield (
            "time",
            f"more than {show_step_time(step_s)} a step and {show_duration(in_all_s)} in all, "
            f"which would be the whole peak of {peak:g} TFLOP/s",
        )


def _pipeline(job: TrainJob, planned: Sequence[Stage], num_microbatches: int) -> str:
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


def _held_rows(
    job: TrainJob, processes: int, planned: Sequence[Stage]
) -> Iterator[tuple[str, ...]]:
    """Yield a row for each pipeline rank: what one process of it does and keeps."""
    for rank in range(job.parallel.pipeline):
        own = [stage for stage in planned if stage.rank == rank]
        held = stages.held_of_rank(planned, rank)
        kept = memory(job, held, processes)
        parts = (kept.weights, kept.gradients, kept.optimizer, kept.total)
        yield (
            str(rank),
            f"{sum(stage.cost for stage in own) / len(own):.2f}",
            show_tokens(held.total),
            *map(show_bytes, parts),
        )
