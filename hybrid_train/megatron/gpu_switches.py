"""Switches of speed and memory as fields of core's configs, and what a CPU leaves out of them.

`SWITCHES` is the table: a setting, the fields of core 0.19.2 that it becomes, and what it needs. On
a CPU, and where plain kernels run, a switch that needs more is left out, and the start of a run
says so; its numbers are those of a run that has not asked.
"""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.activations import squared_relu

from hybrid_train.schema.gpu import CudaGraphs, Gpu, captured_parts
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.train import TrainJob

Fields = dict[str, object]  # of TransformerConfig


class Needs(enum.Enum):
    """What a switch runs on."""

    nothing = "any machine"
    gpu = "a GPU"
    kernels = "a GPU and Transformer Engine"


@dataclass(frozen=True)
class Switch:
    """One setting.

    Attributes:
        path: of the setting.
        asked: whether a job has it on.
        fields: of TransformerConfig that it becomes; none if it goes elsewhere.
        needs: what it runs on.
        elsewhere: where in core it goes, if it is no field of TransformerConfig.
        instead: what runs where it is left out, in words.
    """

    path: str
    asked: Callable[[TrainJob], bool]
    fields: Callable[[TrainJob], Fields]
    needs: Needs
    elsewhere: str = ""
    instead: str = ""


def config_fields(job: TrainJob, *, on_gpu: bool, fused: bool) -> Fields:
    """Return the fields of TransformerConfig that the switches of a job become.

    Args:
        job: a checked job.
        on_gpu: whether it runs on GPUs.
        fused: whether Transformer Engine's kernels run there.
    """
    found: Fields = {}
    for switch in SWITCHES:
        if switch.asked(job) and _runs(switch, on_gpu=on_gpu, fused=fused):
            found |= switch.fields(job)
    return found


def left_out(job: TrainJob, *, on_gpu: bool, fused: bool) -> Iterator[str]:
    """Yield what of the switches of a job does not run here, and what runs instead."""
    for switch in SWITCHES:
        if switch.asked(job) and not _runs(switch, on_gpu=on_gpu, fused=fused):
            instead = f": {switch.instead}" if switch.instead else ""
            yield f"{switch.path} needs {switch.needs.value}{instead}"


def _runs(switch: Switch, *, on_gpu: bool, fused: bool) -> bool:
    there = {Needs.nothing: True, Needs.gpu: on_gpu, Needs.kernels: on_gpu and fused}
    return there[switch.needs]


def _dispatcher(job: TrainJob) -> Fields:
    chosen = job.parallel.dispatcher
    if not chosen.is_flex:
        return {"moe_token_dispatcher_type": chosen.value}
    fields: Fields = {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": chosen.value,
    }
    if job.gpu.dispatcher_sms is not None:
        fields["moe_flex_dispatcher_num_sms"] = job.gpu.dispatcher_sms
    return fields


def _graphs(job: TrainJob) -> Fields:
    warmup: Fields = {"cuda_graph_warmup_steps": job.gpu.cuda_graph_warmup_steps}
    if job.gpu.cuda_graphs is CudaGraphs.step:
        return {"cuda_graph_impl": "full_iteration", **warmup}
    captured = captured_parts(job.gpu, parse(job.model.pattern).main)
    return {
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_modules": [part.value for part in captured],
        **warmup,
    }


def _offloaded(job: TrainJob) -> Fields:
    return {
        "fine_grained_activation_offloading": True,
        "offload_modules": [part.value for part in job.gpu.offloaded_parts],
    }


def _gpu(name: str) -> Callable[[TrainJob], bool]:
    return lambda job: bool(getattr(job.gpu, name))


def _parallel(name: str) -> Callable[[TrainJob], bool]:
    return lambda job: bool(getattr(job.parallel, name))


def _always(**fields: Any) -> Callable[[TrainJob], Fields]:
    return lambda _: dict(fields)


def _has_experts(job: TrainJob) -> bool:
    return "E" in parse(job.model.pattern).layers


SWITCHES = (
    Switch(
        "parallel.dispatcher",
        lambda job: _has_experts(job) and not job.parallel.dispatcher.is_flex,
        _dispatcher,
        Needs.nothing,
    ),
    Switch(
        "parallel.dispatcher",
        lambda job: _has_experts(job) and job.parallel.dispatcher.is_flex,
        _dispatcher,
        Needs.gpu,
        instead="alltoall takes its place",
    ),
    Switch(
        "parallel.overlap_tensor",
        _parallel("overlap_tensor"),
        _always(tp_comm_overlap=True),
        Needs.kernels,
        instead="GEMMs and collectives run one after the other",
    ),
    Switch(
        "parallel.overlap_shared_experts",
        _parallel("overlap_shared_experts"),
        _always(moe_shared_expert_overlap=True),
        Needs.nothing,
    ),
    Switch(
        "parallel.overlap_expert_gradients",
        _parallel("overlap_expert_gradients"),
        _always(overlap_dispatch_backward_with_experts_wgrad=True),
        Needs.kernels,
    ),
    Switch("gpu.cuda_graphs", lambda job: job.gpu.cuda_graphs is not CudaGraphs.none, _graphs,
           Needs.kernels, instead="each kernel is launched by itself"),
    Switch("gpu.fused_permutation", _gpu("fused_permutation"), _always(moe_permute_fusion=True),
           Needs.kernels),
    Switch("gpu.fused_router", _gpu("fused_router"), _always(moe_router_fusion=True),
           Needs.kernels),
    Switch("gpu.fused_squared_relu", _gpu("fused_squared_relu"),
           _always(use_fused_weighted_squared_relu=True, activation_func=squared_relu),
           Needs.kernels),
    Switch("gpu.offloaded_parts", _gpu("offloaded_parts"), _offloaded, Needs.kernels,
           instead="activations stay where they are"),
    Switch("precision.fp8_attention", lambda job: job.precision.fp8_attention,
           _always(fp8_dot_product_attention=True), Needs.kernels,
           instead="attention runs in bfloat16"),
    Switch("profile.equal_load", lambda job: job.profile.equal_load,
           _always(moe_router_force_load_balancing=True), Needs.nothing),
    Switch("runtime.deterministic", lambda job: job.runtime.deterministic,
           _always(deterministic_mode=True), Needs.nothing),
    Switch("gpu.high_priority_groups", _gpu("high_priority_groups"), _always(), Needs.gpu,
           elsewhere="initialize_model_parallel(high_priority_stream_groups)"),
    Switch("gpu.nccl_config", _gpu("nccl_config"), _always(), Needs.gpu,
           elsewhere="initialize_model_parallel(nccl_communicator_config_path)"),
    Switch("gpu.nccl_user_buffers", _gpu("nccl_user_buffers"), _always(), Needs.gpu,
           elsewhere="DistributedDataParallelConfig.nccl_ub"),
    Switch("optimizer.offload_share", lambda job: job.optimizer.offload_share > 0, _always(),
           Needs.nothing,
           elsewhere="OptimizerConfig.optimizer_cpu_offload"),
    Switch("parallel.bucket_parameters", _parallel("bucket_parameters"), _always(), Needs.nothing,
           elsewhere="DistributedDataParallelConfig.bucket_size"),
)  # fmt: skip


def group_options(gpu: Gpu, *, on_gpu: bool) -> dict[str, Any]:
    """Return what `initialize_model_parallel` is told of NCCL; nothing where gloo is used."""
    if not on_gpu:
        return {}
    return {
        "high_priority_stream_groups": [group.value for group in gpu.high_priority_groups] or None,
        "nccl_communicator_config_path": gpu.nccl_config,
    }
