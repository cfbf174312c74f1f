"""What only a GPU does: switches of speed and memory, which a CPU leaves out and says so."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid_train.schema.limits import Count, FileName
from hybrid_train.schema.problems import Problem


class CudaGraphs(enum.Enum):
    """What is captured once and then replayed, so that the CPU need not launch each kernel."""

    none = "none"
    layers = "layers"  # each layer, or the parts of it that `cuda_graph_parts` names
    step = "step"  # all passes of a step and the reduction of gradients; no expert layers


class GraphPart(enum.Enum):
    """Layers, or the part of an expert layer whose shapes do not depend on the tokens."""

    attn = "attn"  # * layers
    mamba = "mamba"  # M layers
    mlp = "mlp"  # - layers, of a model without experts
    moe_router = "moe_router"  # of E layers: the norm, the router, the shared expert
    moe_preprocess = "moe_preprocess"  # of E layers: what the dispatcher does first


class OffloadedPart(enum.Enum):
    """Activations that wait in host memory between the forward and the backward pass."""

    attn_norm = "attn_norm"  # input of the norm of a * layer
    qkv_linear = "qkv_linear"
    core_attn = "core_attn"
    attn_proj = "attn_proj"
    mlp_norm = "mlp_norm"  # input of the norm of an E layer
    expert_fc1 = "expert_fc1"
    moe_act = "moe_act"


class NcclGroup(enum.Enum):
    """Processes that share a communicator; the names are Megatron's."""

    tp = "tp"
    pp = "pp"
    cp = "cp"
    dp = "dp"
    dp_cp = "dp_cp"
    ep = "ep"
    ep_dp = "ep_dp"
    ep_tp = "ep_tp"
    tp_ep_mp = "tp_ep_mp"  # through which deepep and hybridep send tokens


@dataclass(kw_only=True)
class Gpu:
    """Switches that change speed and memory, and numbers by rounding alone."""

    cuda_graphs: CudaGraphs = CudaGraphs.none
    cuda_graph_parts: list[GraphPart] | None = None  # null: all M and *, and - without experts
    cuda_graph_warmup_steps: Count = 3  # steps before the capture
    fused_permutation: bool = False  # sort tokens by expert in one kernel
    fused_router: bool = False  # scores, choice and balance loss in one kernel
    fused_squared_relu: bool = False  # of experts, with the weight of the token
    dispatcher_sms: Count | None = None  # of deepep and hybridep; null: what the library takes
    offloaded_parts: list[OffloadedPart] = field(default_factory=list)
    high_priority_groups: list[NcclGroup] = field(default_factory=list)  # their CUDA streams
    nccl_config: FileName | None = None  # YAML of Megatron: {ep: {max_ctas: 32}, ...}
    nccl_user_buffers: bool = False  # register the buffers of gradients with NCCL

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        parts = self.cuda_graph_parts
        if parts is not None and self.cuda_graphs is not CudaGraphs.layers:
            rule = "needs gpu.cuda_graphs=layers"
            yield Problem("cuda_graph_parts", _shown(parts), rule, "null")
        elif parts is not None and not parts:
            yield Problem("cuda_graph_parts", "[]", "must name a part", "null")
        elif parts and GraphPart.moe_preprocess in parts and GraphPart.moe_router not in parts:
            rule = "with moe_preprocess must name moe_router, which comes before it"
            near = _shown([*parts, GraphPart.moe_router])
            yield Problem("cuda_graph_parts", _shown(parts), rule, near)
        given = self.offloaded_parts
        if OffloadedPart.attn_proj in given and OffloadedPart.core_attn not in given:
            rule = "with attn_proj must name core_attn, whose output it is"
            near = _shown([*given, OffloadedPart.core_attn])
            yield Problem("offloaded_parts", _shown(given), rule, near)


# The letters of a pattern whose layers have a part.
LETTERS: dict[GraphPart | OffloadedPart, str] = {
    GraphPart.attn: "*",
    GraphPart.mamba: "M",
    GraphPart.mlp: "-",
    GraphPart.moe_router: "E",
    GraphPart.moe_preprocess: "E",
    OffloadedPart.attn_norm: "*",
    OffloadedPart.qkv_linear: "*",
    OffloadedPart.core_attn: "*",
    OffloadedPart.attn_proj: "*",
    OffloadedPart.mlp_norm: "E",
    OffloadedPart.expert_fc1: "E",
    OffloadedPart.moe_act: "E",
}


def captured_parts(gpu: Gpu, letters: str) -> list[GraphPart]:
    """Return what CUDA graphs hold: the parts asked for, or all layers of fixed shapes.

    Core 0.19.2 takes every layer of a model with experts for an expert layer, and captures no `-`
    layer of it (transformer_config.py 2501).

    Args:
        gpu: the section.
        letters: of the main layers; those of MTP blocks are not captured.
    """
    if gpu.cuda_graphs is not CudaGraphs.layers:
        return []
    if gpu.cuda_graph_parts is not None:
        return gpu.cuda_graph_parts
    whole = (GraphPart.attn, GraphPart.mamba, GraphPart.mlp)
    left_out = {GraphPart.mlp} if "E" in letters else set()
    return [part for part in whole if LETTERS[part] in letters and part not in left_out]


def _shown(parts: list[GraphPart] | list[OffloadedPart]) -> str:
    return f"[{','.join(part.value for part in parts)}]"
