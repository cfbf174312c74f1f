"""Rules about switches of speed and memory: what Megatron-Core refuses, or would take and not do.

Where a comment names a file, it is one of Megatron-Core 0.19.2. Whether a GPU and the libraries are
there is no rule: a CPU leaves out what it cannot do, and says so (`megatron/gpu_switches.py`).
"""

from collections.abc import Iterable, Iterator

from hybrid_train.planning import degrees
from hybrid_train.planning.phases import views_of
from hybrid_train.schema.data import Packing
from hybrid_train.schema.gpu import LETTERS, CudaGraphs, GraphPart, OffloadedPart, captured_parts
from hybrid_train.schema.objective import NextToken
from hybrid_train.schema.parallel import Dispatcher, Recompute, RecomputeModule
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.precision import Backend, GemmFormat, NumberFormat
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Kernels
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import tokens

_IN_EXPERTS = {OffloadedPart.expert_fc1, OffloadedPart.moe_act}
# Formats of the run that Transformer Engine has attention in (extensions/transformer_engine.py).
_WITH_ATTENTION = (GemmFormat.fp8_tensorwise, GemmFormat.fp8_delayed, GemmFormat.mxfp8)


def _experts_are_there(job: TrainJob, _: int) -> Iterator[Problem]:
    """Switches of expert layers need some."""
    if _has(job, "E"):
        return
    rule = "the pattern has no expert layers (E)"
    if job.parallel.dispatcher is not Dispatcher.alltoall:
        yield Problem("parallel.dispatcher", job.parallel.dispatcher.value, rule, "alltoall")
    if job.profile.equal_load:
        yield Problem("profile.equal_load", True, rule, "false")
    for name in ("overlap_shared_experts", "overlap_expert_gradients"):
        if getattr(job.parallel, name):
            yield Problem(f"parallel.{name}", True, rule, "false")
    for name in ("fused_permutation", "fused_router", "fused_squared_relu"):
        if getattr(job.gpu, name):
            yield Problem(f"gpu.{name}", True, rule, "false")


def _dispatcher_fits(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    chosen = plan.dispatcher
    ranks = plan.expert * degrees.expert_tensor(plan)
    if chosen.is_flex and ranks == 1:  # transformer/moe/token_dispatcher.py 1770
        rule = "needs experts on several ranks: parallel.expert x expert_tensor is 1"
        yield Problem("parallel.dispatcher", chosen.value, rule, "alltoall")
    if job.gpu.dispatcher_sms is not None and not chosen.is_flex:
        rule = f"is of parallel.dispatcher=deepep and hybridep, not {chosen.value}"
        yield Problem("gpu.dispatcher_sms", job.gpu.dispatcher_sms, rule, "null")


def _shared_experts_can_overlap(job: TrainJob, _: int) -> Iterator[Problem]:
    plan, moe = job.parallel, job.model.moe
    if not plan.overlap_shared_experts or not _has(job, "E"):
        return
    path, rule = "parallel.overlap_shared_experts", ""
    if moe.shared_intermediate_size is None:
        rule = "there are none: model.moe.shared_intermediate_size is null"
    elif moe.latent_size is not None:  # transformer/moe/moe_layer.py 473
        rule = "Megatron trains none beside experts of a latent width (model.moe.latent_size)"
    elif plan.dispatcher is Dispatcher.allgather:  # transformer_config.py
        rule = "needs parallel.dispatcher=alltoall, deepep or hybridep"
    elif RecomputeModule.shared_experts in job.parallel.recomputed:
        rule = "does not go with shared_experts in parallel.recompute_modules"
    if rule:
        yield Problem(path, True, rule, "false")


def _expert_gradients_can_overlap(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    if not plan.overlap_expert_gradients or not _has(job, "E"):
        return
    rule = ""
    if plan.expert == 1:
        rule = "needs parallel.expert > 1: gradients are computed while tokens travel"
    elif plan.fsdp:
        rule = "does not go with parallel.fsdp=true, which reduces gradients as they come"
    if rule:
        yield Problem("parallel.overlap_expert_gradients", True, rule, "false")


def _tensor_overlap_fits(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    if not plan.overlap_tensor:
        return
    if plan.tensor == 1 or plan.sequence is False:
        rule = "needs parallel.tensor > 1, and norms split along the sequence"
        yield Problem("parallel.overlap_tensor", True, rule, "false")
    elif len(job.objective.models(job.model)) > 1:
        rule = "has buffers for one network, and the objective has several"
        yield Problem("parallel.overlap_tensor", True, rule, "false")


def _shapes_stay(job: TrainJob, _: int) -> Iterator[Problem]:
    """What is laid out once for the shapes of a step needs them in every phase."""
    if job.gpu.cuda_graphs is CudaGraphs.none and not job.parallel.overlap_tensor:
        return
    reason = _changes(job)
    if reason and job.gpu.cuda_graphs is not CudaGraphs.none:
        rule = f"needs steps of one shape: {reason}"
        yield Problem("gpu.cuda_graphs", job.gpu.cuda_graphs.value, rule, "none")
    if reason and job.parallel.overlap_tensor:
        rule = f"needs steps of one shape: {reason}"
        yield Problem("parallel.overlap_tensor", True, rule, "false")


def _changes(job: TrainJob) -> str:
    """Return what changes the shapes of steps in a run; empty: nothing."""
    if tokens(job.train.batch_ramp.tokens):
        return "train.batch_ramp lets the batch grow"
    shapes = [
        (one.train.sequence_length, one.train.microbatch, one.train.global_batch)
        for one in views_of(job)
    ]
    layouts = [(one.parallel, one.precision) for one in views_of(job)]
    if len(set(shapes)) > 1:
        return "phases have other lengths or batches"
    if any(layout != layouts[0] for layout in layouts):
        return "phases have other layouts or formats"
    return ""


def _graphs_can_be_captured(job: TrainJob, _: int) -> Iterator[Problem]:
    gpu, plan = job.gpu, job.parallel
    if gpu.cuda_graphs is CudaGraphs.none:
        return
    path, value = "gpu.cuda_graphs", gpu.cuda_graphs.value
    if plan.fsdp:  # its hooks on modules run Python between kernels
        yield Problem(path, value, "does not go with parallel.fsdp=true", "none")
    if job.data.packing is not Packing.none:
        rule = "needs data.packing=none: documents end elsewhere in each row"
        yield Problem(path, value, rule, "none")


def _layers_can_be_captured(job: TrainJob, _: int) -> Iterator[Problem]:
    gpu, plan = job.gpu, job.parallel
    if gpu.cuda_graphs is not CudaGraphs.layers:
        return
    path, value = "gpu.cuda_graphs", gpu.cuda_graphs.value
    if plan.recompute is Recompute.full:  # transformer_config.py
        yield Problem(path, value, "does not go with parallel.recompute=full", "none")
    captured = set(captured_parts(gpu, parse(job.model.pattern).main))
    if not captured:  # which would be all layers, whole, to core (transformer/cuda_graphs.py 2053)
        yield Problem(path, value, "the model has no M or * layer, nor - without experts", "none")
    if GraphPart.mlp in captured and _has(job, "E"):  # transformer_config.py 2501
        rule = "with mlp does not go with experts: Megatron captures no - layer beside them"
        yield Problem(
            "gpu.cuda_graph_parts", _shown(captured), rule, _left(captured, GraphPart.mlp)
        )
    if GraphPart.attn in captured and job.model.attention.rope.theta is not None:
        # Core asks its own embedding for the angles (transformer/cuda_graphs.py 2306).
        rule = "with attn does not go with positions (model.attention.rope.theta)"
        near = _left(captured, GraphPart.attn)
        yield Problem("gpu.cuda_graph_parts", _shown(captured), rule, near)
    for module, parts in (
        (RecomputeModule.mamba, {GraphPart.mamba}),
        (RecomputeModule.moe, {GraphPart.moe_router, GraphPart.moe_preprocess}),
        (RecomputeModule.mlp, {GraphPart.mlp}),
        # Core would keep them, or ask for random states while it captures (random.py 673, 755).
        (RecomputeModule.core_attn, {GraphPart.attn}),
        (RecomputeModule.layernorm, {GraphPart.moe_preprocess}),
        (RecomputeModule.shared_experts, {GraphPart.moe_router}),
    ):
        if module in job.parallel.recomputed and parts & captured:
            rule = f"holds what parallel.recompute_modules computes again ({module.value})"
            near = _left(captured, *parts)
            yield Problem("gpu.cuda_graph_parts", _shown(captured), rule, near)


def _steps_can_be_captured(job: TrainJob, _: int) -> Iterator[Problem]:
    """What Python does in the passes happens once, at the capture; a replay is of kernels alone."""
    gpu, plan = job.gpu, job.parallel
    if gpu.cuda_graphs is not CudaGraphs.step:
        return
    for rule, broken in (
        # The counts go to the host (transformer/moe/token_dispatcher.py 950, experts.py 769).
        ("captures no expert layers (E): the host waits for their tokens", _has(job, "E")),
        # p2p_communication.py 419.
        ("needs parallel.pipeline=1: the host waits between stages", plan.pipeline > 1),
        # It asks for random states (tensor_parallel/random.py 527), which a capture does not allow.
        ("does not go with parallel.recompute", plan.recompute is not Recompute.none),
        # It was read for this one; others may have turns, or look at values on the host.
        ("captures objective.kind=next_token alone", type(job.objective) is not NextToken),
        ("needs gpu.offloaded_parts=[]: hooks move them", bool(gpu.offloaded_parts)),
        # Numbers that are rounded to depend on the step.
        ("does not go with precision.backend=emulated", _emulated(job)),
    ):
        if broken:
            yield Problem("gpu.cuda_graphs", gpu.cuda_graphs.value, rule, "none")
    if plan.overlap_param_gather:
        # What is gathered is noted in Python, and the note taken back in the reduction
        # (param_and_grad_buffer.py 798): a validation would see weights of an earlier one.
        rule = "does not go with gpu.cuda_graphs=step, whose replays take back no note of a gather"
        yield Problem("parallel.overlap_param_gather", True, rule, "false")
    if _quantizes(job) and job.precision.statistics_interval:
        rule = "does not go with gpu.cuda_graphs=step: a replay runs no hooks that measure"
        interval = job.precision.statistics_interval
        yield Problem("precision.statistics_interval", interval, rule, 0)


def _emulated(job: TrainJob) -> bool:
    return _quantizes(job) and job.precision.backend is Backend.emulated


def _quantizes(job: TrainJob) -> bool:
    asked = {job.precision.format, *(one.format for one in job.precision.exceptions)}
    return bool(asked - {GemmFormat.fp32, GemmFormat.bf16})


def _shown(parts: Iterable[GraphPart]) -> str:
    return f"[{','.join(sorted(part.value for part in parts))}]"


def _left(parts: set[GraphPart], *others: GraphPart) -> str | None:
    """Return parts without some others, as they would be written; None where nothing is left."""
    left = parts - set(others)
    return _shown(left) if left else None


def _named_parts_exist(job: TrainJob, _: int) -> Iterator[Problem]:
    for name in ("cuda_graph_parts", "offloaded_parts"):
        parts: list[GraphPart | OffloadedPart] = getattr(job.gpu, name) or []
        # Layers of MTP blocks are not captured: core sees their stack as one (cuda_graphs.py 2049).
        pattern = parse(job.model.pattern)
        letters = pattern.main if name == "cuda_graph_parts" else pattern.layers
        missing = [part for part in parts if LETTERS[part] not in letters]
        if missing:
            named = ", ".join(part.value for part in missing)
            there = [part.value for part in parts if part not in missing]
            near = f"[{','.join(there)}]" if there or name == "offloaded_parts" else "null"
            shown = f"[{','.join(part.value for part in parts)}]"
            yield Problem(f"gpu.{name}", shown, f"the model has no {named}", near)


def _offloaded_parts_are_kept(job: TrainJob, _: int) -> Iterator[Problem]:
    # transformer_config.py: what is computed again is not kept, and cannot be moved.
    parts, plan = job.gpu.offloaded_parts, job.parallel
    shown = f"[{','.join(part.value for part in parts)}]"
    if parts and plan.recompute is Recompute.full:
        rule = "keeps nothing to move with parallel.recompute=full"
        yield Problem("gpu.offloaded_parts", shown, rule, "[]")
    elif RecomputeModule.moe in job.parallel.recomputed and _IN_EXPERTS & set(parts):
        left = [part.value for part in parts if part not in _IN_EXPERTS]
        rule = "is inside of moe, which parallel.recompute_modules computes again"
        yield Problem("gpu.offloaded_parts", shown, rule, f"[{','.join(left)}]")
    elif dropped := set(parts) & _not_kept(job):
        left = [part.value for part in parts if part not in dropped]
        named = ", ".join(sorted(part.value for part in dropped))
        rule = f"holds what is captured or computed again, and not kept: {named}"
        yield Problem("gpu.offloaded_parts", shown, rule, f"[{','.join(left)}]")


def _not_kept(job: TrainJob) -> set[OffloadedPart]:
    """Return parts that core would not move, and not say so (transformer_layer.py 1460)."""
    captured = set(captured_parts(job.gpu, parse(job.model.pattern).main))
    found = {OffloadedPart.attn_norm} if GraphPart.attn in captured else set()
    found |= {OffloadedPart.mlp_norm} if GraphPart.moe_router in captured else set()
    if RecomputeModule.core_attn in job.parallel.recomputed:
        found |= {OffloadedPart.core_attn, OffloadedPart.attn_proj}
    return found


def _attention_has_the_format(job: TrainJob, _: int) -> Iterator[Problem]:
    format = job.precision.format
    if job.precision.fp8_attention and format not in _WITH_ATTENTION:
        rule = f"needs precision.format={', '.join(one.value for one in _WITH_ATTENTION)}"
        yield Problem("precision.fp8_attention", True, rule, "false")
    elif job.precision.fp8_attention and not _has(job, "*"):
        yield Problem("precision.fp8_attention", True, "the pattern has no attention (*)", "false")


def _switches_have_kernels(job: TrainJob, _: int) -> Iterator[Problem]:
    """What Transformer Engine does is not asked of plain kernels."""
    if job.runtime.kernels is not Kernels.plain:
        return
    rule = "needs runtime.kernels=auto or fused"
    for name in ("fused_permutation", "fused_router", "fused_squared_relu"):
        if getattr(job.gpu, name):
            yield Problem(f"gpu.{name}", True, rule, "false")
    if job.gpu.cuda_graphs is not CudaGraphs.none:
        yield Problem("gpu.cuda_graphs", job.gpu.cuda_graphs.value, rule, "none")
    for name in ("overlap_tensor", "overlap_expert_gradients"):
        if getattr(job.parallel, name):
            yield Problem(f"parallel.{name}", True, rule, "false")


def _buckets_and_buffers_fit(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    if plan.bucket_parameters is not None and (plan.fsdp or not plan.overlap_grad_reduce):
        rule = "needs parallel.overlap_grad_reduce=true: else all gradients are reduced at once"
        if plan.fsdp:
            rule = "does nothing with parallel.fsdp=true, which cuts by layers"
        yield Problem("parallel.bucket_parameters", plan.bucket_parameters, rule, "null")
    if job.gpu.nccl_user_buffers and (plan.fsdp or plan.pipeline > 1):
        # Each buffer waits for all processes (param_and_grad_buffer.py 1143); stages have different
        # ones, and FSDP registers those of equal layers alone.
        rule = "needs parallel.pipeline=1 and parallel.fsdp=false"
        yield Problem("gpu.nccl_user_buffers", True, rule, "false")
    if job.recovery.checksum_interval and plan.fsdp:
        rule = "compares nothing with parallel.fsdp=true, which keeps no weight twice"
        yield Problem("recovery.checksum_interval", job.recovery.checksum_interval, rule, 0)


def _optimizer_can_be_offloaded(job: TrainJob, _: int) -> Iterator[Problem]:
    """Core's optimizer in host memory takes parts of weights, and keeps float32 alone."""
    share, plan, precision = job.optimizer.offload_share, job.parallel, job.precision
    if not share:
        return
    halved = precision.base is NumberFormat.bf16 and not precision.reduce_gradients_in_fp32
    rules = {
        "needs parallel.distributed_optimizer=true and parallel.fsdp=false": (
            plan.distributed_optimizer and not plan.fsdp  # optimizer_config.py 435
        ),
        "needs optimizer state in float32; in reduced precision is "
        f"{', '.join(job.optimizer.reduced_state)}": not job.optimizer.reduced_state,
        # Others are turned to float32 on a stream that the update does not wait for
        # (hybrid_optimizer.py 89 and 166), and clipped before that.
        "needs precision.reduce_gradients_in_fp32=true": not halved,
        "needs precision.fp8_param_gather=false: it writes bfloat16 or float32 weights": (
            not precision.fp8_param_gather
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            yield Problem("optimizer.offload_share", share, rule, 0)


def _has(job: TrainJob, letter: str) -> bool:
    return letter in parse(job.model.pattern).layers


SWITCH_RULES = (
    _experts_are_there,
    _dispatcher_fits,
    _shared_experts_can_overlap,
    _expert_gradients_can_overlap,
    _tensor_overlap_fits,
    _shapes_stay,
    _named_parts_exist,
    _graphs_can_be_captured,
    _layers_can_be_captured,
    _steps_can_be_captured,
    _offloaded_parts_are_kept,
    _attention_has_the_format,
    _switches_have_kernels,
    _buckets_and_buffers_fit,
    _optimizer_can_be_offloaded,
)
