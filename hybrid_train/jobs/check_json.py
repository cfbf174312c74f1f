"""What `check json=true` prints: all that the tables say, as plain data. Bytes, tokens, seconds."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from hybrid_train.anatomy import counts, gemm_formats
from hybrid_train.anatomy.gemm_formats import formats_of, fp8_primary_weights, quantizes
from hybrid_train.anatomy.layers import distinct
from hybrid_train.config.rules_of_cluster import room_for
from hybrid_train.config.rules_of_data import data_is_chosen
from hybrid_train.config.rules_of_hardware import gpu_of
from hybrid_train.config.rules_of_precision import hardware_notes
from hybrid_train.config.secrets import masked_data
from hybrid_train.jobs.run_plan import RunPlan, decay_steps
from hybrid_train.planning import degrees, stages
from hybrid_train.planning.gpu_formats import native_formats
from hybrid_train.planning.phases import PhaseSpan, ramps, unread_sources
from hybrid_train.schema.hardware import Card
from hybrid_train.schema.model import Moe
from hybrid_train.schema.objective import Distill
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.units import tokens


def plan_as_data(plan: RunPlan) -> dict[str, Any]:
    """Return the plan of a sound run; what does not apply is null or empty."""
    job = plan.job
    data = {
        "problems": [],
        "processes": plan.processes,
        "cluster": _cluster(plan),
        "model": _model(plan),
        "layout": _layout(plan.first.parallel, plan),
        "batch": _batch(plan),
        "length": _length(plan),
        "flops": _flops(plan),
        "teachers": _teachers(plan),
        "stages": list(_stages(plan)),
        "pipeline_ranks": list(_ranks(plan)),
        "phases": [_phase(plan, one) for one in plan.phases if job.train.phases],
        "formats": [_formats(one) for one in plan.phases],
        "refused_by_a_gpu": [str(note) for note in hardware_notes(job)],
        "sources_not_read": unread_sources(job.data, job.train.phases),
        "still_to_be_set": [{"setting": one.path, "rule": one.rule} for one in data_is_chosen(job)],
    }
    plain: dict[str, Any] = masked_data(data)
    return plain


def problems_as_data(problems: Iterable[Problem]) -> dict[str, Any]:
    """Return what a run is refused for; nothing else is known of it."""
    found = [
        {
            "setting": one.path,
            "value": one.value if isinstance(one.value, int | float | bool) else str(one.value),
            "rule": one.rule,
            "nearest": None if one.nearest is None else str(one.nearest),
            "along": {path: str(value) for path, value in one.along},
        }
        for one in problems
    ]
    plain: dict[str, Any] = masked_data({"problems": found})
    return plain


def _cluster(plan: RunPlan) -> dict[str, Any] | None:
    on = plan.nodes()
    if on is None:
        return None
    cluster, nodes = on
    card, most = plan.card, plan.most_kept()
    memory = None if card is None else round(card.memory_gb * 1e9)
    return {
        "nodes": nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "gpu": None if card is None else _card(cluster.hardware, card),
        "gpu_memory_bytes": memory,
        "most_kept_bytes": most,
        "left_bytes": None if memory is None else memory - most,
        "room": None if card is None else room_for(most, card).value,
    }


def _card(name: str | None, card: Card) -> dict[str, Any]:
    formats = [one.value for one in native_formats(gpu_of(card))]
    return {"name": name, **dataclasses.asdict(card), "formats": formats}


def _model(plan: RunPlan) -> dict[str, Any]:
    model, pattern = plan.job.model, parse(plan.job.model.pattern)
    size, flops = counts.parameters(model, plan.rows), plan.flops_per_token[0]
    return {
        "pattern": str(stages.cut(plan.first, plan.rows)),
        "layers": dict(Counter(pattern.main)),
        "mtp_depths": pattern.mtp_depths,
        "vocabulary": plan.rows,
        "format": plan.job.precision.format.value,
        "parameters": size.total,
        "active_parameters": size.active,
        "parameters_by_kind": dict(size.by_kind),
        "active_parameters_by_kind": dict(size.active_by_kind),
        "tensors": counts.tensors(model).total,
        "forward_flops_per_token": flops.forward,
        "training_flops_per_token": flops.training,
    }


def _layout(parallel: Parallel, plan: RunPlan) -> dict[str, Any]:
    experts = sorted(
        {one.sizes.experts for one in distinct(plan.job.model) if one.letter == Moe.letter}
    )
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "data": degrees.data_parallel(parallel, plan.processes),
        "expert": parallel.expert,
        "expert_tensor": degrees.expert_tensor(parallel),
        "expert_data": degrees.expert_data_parallel(parallel, plan.processes),
        "experts_per_process": [number // parallel.expert for number in experts],
        "splits_sequence": degrees.splits_sequence(parallel),
        "fsdp": parallel.fsdp,
    }


def _batch(plan: RunPlan) -> dict[str, Any]:
    train = plan.first.train
    ramp = train.batch_ramp
    return {
        "sequence_length": train.sequence_length,
        "global_batch": train.global_batch,
        "microbatch": train.microbatch,
        "microbatches": plan.microbatches,
        "tokens_per_step": plan.tokens_per_step,
        "ramp": {
            "tokens": tokens(ramp.tokens),
            "start_batch": ramp.start_batch,
            "increment": ramp.increment,
        }
        if ramps(train)
        else None,
    }


def _length(plan: RunPlan) -> dict[str, int]:
    decay = plan.decay_tokens
    return {
        "tokens": tokens(plan.job.train.tokens),
        "steps": plan.steps,
        "warmup_tokens": tokens(plan.job.schedule.warmup_tokens),
        "warmup_steps": plan.warmup_steps,
        "decay_tokens": decay,
        "decay_steps": decay_steps(plan.phases, decay) if decay else 0,
    }


def _flops(plan: RunPlan) -> dict[str, Any]:
    least = plan.least_seconds()
    return {
        "of_the_run": plan.flops,
        "of_a_step_and_process": plan.flops_of_a_step,
        "peak_flops": None if plan.peak is None else plan.peak.tflops * 1e12,
        "least_step_s": None if least is None else least[0],
        "least_run_s": None if least is None else least[1],
        "bubble_share": stages.bubble_share(
            plan.first.parallel.pipeline, plan.first.parallel.virtual_pipeline, plan.microbatches
        ),
        "idle_share": 1 - stages.most_work_share(plan.stages, plan.microbatches),
    }


def _teachers(plan: RunPlan) -> dict[str, Any] | None:
    taught = plan.taught
    if not isinstance(plan.job.objective, Distill):
        return None
    read, storable = taught.read, taught.storable
    return {
        "unknown": taught.unknown or None,
        "kept": [
            {"teacher": one.source, "weights_bytes": one.weights, "hidden_states_bytes": one.slots}
            for one in taught.teachers
        ],
        "forward_flops_per_token": taught.flops[0],
        "targets": None if read is None else {"folder": read.folder, "bytes": read.bytes},
        "storable": None
        if storable is None
        else {
            "rows": storable.rows,
            "tokens": storable.tokens,
            "kinds": [
                {**dataclasses.asdict(one), "least_s": plan.seconds_of(one.flops)}
                for one in storable.kinds
            ],
        },
    }


def _stages(plan: RunPlan) -> Iterator[dict[str, Any]]:
    for number, stage in enumerate(plan.stages):
        yield {
            "stage": number,
            "pipeline_rank": stage.rank,
            "contents": stage.contents,
            "cost": stage.cost,
            "parameters": stage.held.total,
        }


def _ranks(plan: RunPlan) -> Iterator[dict[str, Any]]:
    for rank in range(plan.first.parallel.pipeline):
        kept = plan.kept_of_rank(rank)
        yield {
            "pipeline_rank": rank,
            "cost": plan.cost_of_rank(rank),
            "parameters": stages.held_of_rank(plan.stages, rank).total,
            "weights_bytes": kept.weights,
            "gradients_bytes": kept.gradients,
            "optimizer_bytes": kept.optimizer,
            "kept_bytes": kept.total,
            "host_bytes": kept.host,
        }


def _phase(plan: RunPlan, one: PhaseSpan) -> dict[str, Any]:
    asked = plan.job.train.phases[one.number]
    return {
        "name": one.name,
        "start_tokens": one.start,
        "tokens": one.end - one.start,
        "steps": one.length.steps,
        "sequence_length": one.job.train.sequence_length,
        "global_batch": one.job.train.global_batch,
        "constant_lr": asked.constant_lr,
        "most_kept_bytes": stages.most_kept(one.job, plan.processes, plan.rows),
        "layout": _layout(one.job.parallel, plan),
    }


def _formats(phase: PhaseSpan) -> dict[str, Any]:
    """Return which layers multiply in which format in a phase; layers count from 1."""
    model, precision = phase.job.model, phase.job.precision
    found: dict[tuple[str, str], list[int]] = {}
    if quantizes(model, precision):
        for linear, formats in formats_of(model, precision).items():
            key = (linear.module, gemm_formats.formats_in_words(formats))
            found.setdefault(key, []).append(linear.layer)
    return {
        "phase": phase.name,
        "base": precision.base.value,
        "modules": [
            {"module": module, "format": words, "layers": layers}
            for (module, words), layers in found.items()
        ],
        "weights_kept_in_fp8": len(fp8_primary_weights(model, precision)),
    }
