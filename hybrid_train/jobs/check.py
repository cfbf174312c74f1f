"""The job `check`: the plan of a training run, for as many processes as it will have, as tables.

It needs neither those processes nor torch: all that is printed follows from the config.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence

from rich.console import Console

from hybrid_train.anatomy import counts, gemm_formats
from hybrid_train.anatomy.gemm_formats import formats_of, kept_in_words, quantizes
from hybrid_train.anatomy.layers import distinct
from hybrid_train.config.launcher import require_alone
from hybrid_train.config.rules_of_cluster import Room, room_for
from hybrid_train.config.rules_of_data import data_is_chosen
from hybrid_train.config.rules_of_hardware import gpu_of
from hybrid_train.config.rules_of_precision import hardware_notes
from hybrid_train.jobs.check_json import plan_as_data
from hybrid_train.jobs.help import console, show_numbers, table
from hybrid_train.jobs.run_plan import RunPlan, decay_steps, show_phases
from hybrid_train.jobs.teacher_plan import StorableTargets
from hybrid_train.planning import degrees, stages
from hybrid_train.planning.gpu_formats import native_formats
from hybrid_train.planning.phases import PhaseSpan, ramps, unread_sources
from hybrid_train.planning.stages import Stage
from hybrid_train.schema.hardware import Card
from hybrid_train.schema.job_roots import CheckJob
from hybrid_train.schema.model import Moe
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.train import Train, TrainJob
from hybrid_train.schema.units import counted, show_bytes, show_tokens, tokens
from hybrid_train.tracking.metrics import show_duration, show_step_time

_STAGE_HEADS = ("stage", "pipeline rank", "cost", "parameters")
_HELD_HEADS = (
    "pipeline rank", "cost", "parameters", "weights", "gradients", "optimizer", "kept",
)  # fmt: skip


def run(job: CheckJob) -> None:
    """Print what every process will do and hold, and what is still to be set."""
    require_alone("check")
    plan = RunPlan.of(job)
    if job.json:
        print(json.dumps(plan_as_data(plan), indent=1, allow_nan=False))  # noqa: T201  the result
        return
    page = console()
    page.print(table(_facts(plan)))
    if len(plan.stages) > 1:
        page.print(f"\n{stages.cut(plan.first, plan.rows)}\n", soft_wrap=True)
        show_numbers(page, list(_stage_rows(plan.stages)), _STAGE_HEADS)
    page.print()
    show_numbers(page, list(_held_rows(plan)), _HELD_HEADS)
    unknown = "activations, buffers of libraries"
    unknown += "." if plan.card else ", how much memory a GPU has: cluster.hardware=NAME says."
    page.print(
        "\nCost: forward FLOPs relative to the mean. Parameters and bytes: of one process, kept "
        f"from step to\nstep. Not known here: {unknown}",
        soft_wrap=True,
    )
    if len(plan.phases) > 1:
        show_phases(page, plan)
    _show_formats(page, plan.phases)
    _show_remarks(page, job)


def _show_remarks(page: Console, job: CheckJob) -> None:
    """Print what does not stand in the way of the plan, and has to be known."""
    if unread := unread_sources(job.data, job.train.phases):
        page.print(
            f"\nThe phases name sources ({', '.join(unread)}). Without data.sources all phases "
            "read the same data."
        )
    if notes := hardware_notes(job):
        page.print("\nThis runs emulated; a GPU that computes quantized GEMMs would refuse it:")
        for note in notes:
            page.print(f"  {note}", soft_wrap=True, highlight=False, markup=False)
    unset = list(data_is_chosen(job))
    if unset:
        page.print("\nStill to be set; the plan does not depend on it, but `train` will ask:")
        page.print(table((f"  {problem.path}", problem.rule) for problem in unset))


def _show_formats(page: Console, phases: Sequence[PhaseSpan]) -> None:
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
            f"\nFormats of the GEMMs{of_phase}; all else is {precision.base.value}",
            soft_wrap=True,
        )
        for line in gemm_formats.table_lines(formats, precision.exceptions):
            page.print(line, soft_wrap=True, highlight=False)
        if kept := kept_in_words(phase.job.model, precision):
            page.print(f"FP8 parameters: {kept}", soft_wrap=True, highlight=False)
        shown = precision


def _facts(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Yield the lines above the tables: a word, then what the plan says of it."""
    job, train, parallel = plan.job, plan.first.train, plan.first.parallel
    if len(plan.phases) > 1:
        yield (
            "phases",
            f"{len(plan.phases)}, in the table at the end; above it length, work and the time in "
            f"all are of the run, the rest of phase {plan.phases[0].name}",
        )
    size = counts.parameters(job.model, plan.rows)
    yield (
        "model",
        f"{show_tokens(size.total)} parameters, {show_tokens(size.active)} active; layers "
        f"{parse(job.model.pattern).in_words()}; vocabulary {plan.rows:,}; "
        f"{job.precision.format.value}",
    )
    yield (
        "processes",
        f"{plan.processes:,} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
        f"{parallel.context} x data {plan.data_parallel:,}",
    )
    yield from _cluster(plan)
    if hosted := plan.most_hosted():
        share = job.optimizer.offload_share
        yield "host memory", f"{show_bytes(hosted)} a process for {share:.0%} of the optimizer"
    yield from _teachers(plan)
    yield from _experts(plan)
    yield "sequence", f"{train.sequence_length:,} tokens{_sequence_split(plan.first)}"
    yield (
        "batch",
        f"{counted(train.global_batch, 'sequence')} = data {plan.data_parallel:,} x microbatch "
        f"{train.microbatch} x {counted(plan.microbatches, 'microbatch')}; "
        f"{show_tokens(plan.tokens_per_step)} tokens a step{_growth(train)}",
    )
    yield "length", _length(plan)
    yield from _work(plan)
    if parallel.pipeline > 1:
        yield "pipeline", _pipeline(plan)


def _cluster(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Say how many nodes the run takes, what their GPUs are, and whether the run has room there."""
    on = plan.nodes()
    if on is None:
        return
    cluster, nodes = on
    each = counted(cluster.gpus_per_node, "GPU") if cluster.gpus_per_node else "no GPU"
    yield "cluster", f"{counted(nodes, 'node')} with {each} on each"
    if plan.card is not None:
        formats = (one.value for one in native_formats(gpu_of(plan.card)))
        yield "GPU", _card(plan.card)
        yield "formats", f"the GPU multiplies {', '.join(formats)}"
        yield "memory", _room(plan.most_kept(), plan.card)


def _card(card: Card) -> str:
    """Say what a card has: memory, dense peaks, links."""
    words = [f"{card.title}, {card.memory_gb:g} GB"]
    if card.memory_tb_s is not None:
        words[0] += f" at {card.memory_tb_s:g} TB/s"
    peaks = dataclasses.asdict(card.peak_tflops)
    known = [f"{format} {peak:,g}" for format, peak in peaks.items() if peak is not None]
    words += [f"{', '.join(known)} TFLOP/s"] if known else []
    if card.link_gb_s is not None:
        nvlink = card.nvlink_gpus > 1
        words.append(f"{'NVLink' if nvlink else 'PCIe'} {card.link_gb_s:,g} GB/s")
        words[-1] += f" among {card.nvlink_gpus}" if nvlink else ""
    return "; ".join(words)


def _room(kept: int, card: Card) -> str:
    """Say whether the fullest process of any phase fits into a card."""
    whole = card.memory_gb * 1e9
    words = f"keeps {show_bytes(kept)} of {show_bytes(whole)} ({card.title}): "
    if room_for(kept, card) is Room.tight:
        words += f"tight, {show_bytes(whole - kept)} are left for buffers of CUDA and NCCL and for "
        return f"{words}activations, which are not counted"
    return f"{words}fits; activations are not counted"


def _teachers(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Say what teachers add to what a process keeps, and what their targets take on disk."""
    taught = plan.taught
    if taught.unknown:
        yield "teacher", f"not counted: {taught.unknown}"
    for one in taught.teachers:
        yield (
            "teacher",
            f"{one.source}: {show_bytes(one.weights)} of weights a process at most, "
            f"{show_bytes(one.slots)} of hidden states on the last pipeline rank",
        )
    if taught.read is not None:
        header = taught.read.header
        kind = _stored_kind(header.dtype, header.top_k)
        rows = counted(sum(one.rows for one in header.parts), "row")
        yield (
            "targets",
            f"{taught.read.folder}: {show_bytes(taught.read.bytes)}, {rows} ({kind}) of "
            f"{header.teacher['source']}, step {header.teacher['step']}; no teacher runs",
        )
    if taught.storable is not None:
        yield "targets", _storable(plan, taught.storable)


def _storable(plan: RunPlan, targets: StorableTargets) -> str:
    """Say what it takes to let the teacher say all once."""
    by_labels = any(one.mtp_depths for one in targets.kinds)  # tokens say nothing of a depth
    sizes = " or ".join(
        f"{show_bytes(one.bytes)} ({_stored_kind(one.dtype, one.top_k)}"
        f"{', MTP by labels' if one.top_k and by_labels else ''})"
        for one in targets.kinds
    )
    most = max(one.flops for one in targets.kinds)
    words = (
        f"would take {sizes}, stored by distill_targets for {counted(targets.rows, 'row')}, "
        f"{show_tokens(targets.tokens)} tokens; {most:.3g} FLOP of the teacher"
    )
    seconds = plan.seconds_of(most)
    if seconds is None:
        return f"{words} (distill_targets --dry-run times them)"
    return f"{words}, more than {show_duration(seconds)} at the whole peak"


def _stored_kind(dtype: str, top_k: int | None) -> str:
    return f"hidden states, {dtype}" if top_k is None else f"top {top_k}"


def _experts(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Say how many experts a process has."""
    parallel, model = plan.first.parallel, plan.job.model
    if numbers := {one.sizes.experts for one in distinct(model) if one.letter == Moe.letter}:
        copies = degrees.expert_data_parallel(parallel, plan.processes)
        split = (
            f"{one:,} = expert {parallel.expert} x {one // parallel.expert}" for one in numbers
        )
        yield (
            "experts",
            f"{' or '.join(sorted(split))} a process; expert_tensor "
            f"{degrees.expert_tensor(parallel)}, expert-data {copies:,}",
        )


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


def _length(plan: RunPlan) -> str:
    """Say how many steps the run takes, and the parts of its schedule."""
    words = [f"{plan.job.train.tokens} tokens = {counted(plan.steps, 'step')}"]
    if plan.warmup_steps:
        warmup = tokens(plan.job.schedule.warmup_tokens)
        words.append(f"warm-up {show_tokens(warmup)} = {plan.warmup_steps:,}")
    if decay := plan.decay_tokens:
        words.append(f"decay {show_tokens(decay)} = {decay_steps(plan.phases, decay):,}")
    return "; ".join(words)


def _work(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Say how many operations the run takes, and the time below which it cannot be."""
    of_step = plan.flops_of_a_step / 1e12
    ahead = "; forward passes of teachers are in it" if any(plan.taught.flops) else ""
    yield "work", f"{plan.flops:.3g} FLOP in all, {of_step:.4g} TFLOP a step and process{ahead}"
    least = plan.least_seconds()
    if least is None:
        yield "time", "not known here; runtime.peak_tflops=N of a GPU gives a lower bound"
        return
    assert plan.peak is not None, "it is what the time follows from"
    yield (
        "time",
        f"more than {show_step_time(least[0])} a step and {show_duration(least[1])} in all, "
        f"which would be the whole peak of {plan.peak.tflops:g} TFLOP/s ({plan.peak.source})",
    )


def _pipeline(plan: RunPlan) -> str:
    """Say how much of the time the ranks wait for each other."""
    parallel, number = plan.first.parallel, plan.microbatches
    bubble = stages.bubble_share(parallel.pipeline, parallel.virtual_pipeline, number)
    work = stages.most_work_share(plan.stages, number)
    own = parallel.virtual_pipeline
    each = f", {counted(own, 'stage')} each" if own > 1 else ""
    return (
        f"{counted(parallel.pipeline, 'rank')}{each}; they would wait {bubble:.1%} of a step if "
        f"all stages cost the same; with these {1 - work:.1%} or more"
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


def _held_rows(plan: RunPlan) -> Iterator[tuple[str, ...]]:
    """Yield a row for each pipeline rank: what one process of it does and keeps."""
    for rank in range(plan.first.parallel.pipeline):
        kept = plan.kept_of_rank(rank)
        parts = (kept.weights, kept.gradients, kept.optimizer, kept.total)
        yield (
            str(rank),
            f"{plan.cost_of_rank(rank):.2f}",
            show_tokens(stages.held_of_rank(plan.stages, rank).total),
            *map(show_bytes, parts),
        )
