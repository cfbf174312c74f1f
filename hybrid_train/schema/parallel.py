"""The parallel layout: how many ways each axis of the work is split."""

import enum
from dataclasses import dataclass

from hybrid_train.schema.limits import Count, Processes


class Recompute(enum.Enum):
    """Which activations are computed again in the backward pass instead of kept."""

    none = "none"
    selective = "selective"  # those of `recompute_modules`
    full = "full"  # all but the inputs of layers


class RecomputeModule(enum.Enum):
    """Part of a layer that keeps its input alone."""

    core_attn = "core_attn"  # softmax attention, between the projections
    layernorm = "layernorm"  # the norm before the experts; others are part of a linear layer
    mamba = "mamba"  # all of an M layer
    mlp = "mlp"  # all of a - layer
    moe = "moe"  # all of an E layer behind its norm
    moe_act = "moe_act"  # activation of the routed experts; plain kernels always do so
    shared_experts = "shared_experts"


class RecomputeMethod(enum.Enum):
    """Which layers `recompute=full` means."""

    uniform = "uniform"  # all, in groups of `recompute_layers`, each of which keeps its input
    block = "block"  # the first `recompute_layers` of each pipeline stage


class Dispatcher(enum.Enum):
    """How tokens travel to their experts and back."""

    alltoall = "alltoall"  # each to the ranks of its experts
    allgather = "allgather"  # all to all ranks; for few experts, or many choices of a token
    deepep = "deepep"  # DeepEP's kernels; a CPU takes alltoall
    hybridep = "hybridep"  # HybridEP's, for NVLink between nodes; a CPU takes alltoall

    @property
    def is_flex(self) -> bool:
        """Whether it is a library that Megatron calls flex."""
        return self in (Dispatcher.deepep, Dispatcher.hybridep)


@dataclass(kw_only=True)
class Degrees:
    """How a model is split. What is left of the processes is data parallel."""

    tensor: Processes = 1
    pipeline: Processes = 1
    expert: Processes = 1
    expert_tensor: Processes | None = None  # None: the same as tensor


@dataclass(kw_only=True)
class Parallel(Degrees):
    """The layout of a training run."""

    virtual_pipeline: Processes = 1  # model chunks per pipeline stage (interleaved schedule)
    context: Processes = 1
    sequence: bool | None = None  # split norms along the sequence too; None: when tensor > 1
    distributed_optimizer: bool = True  # split the optimizer state over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass still runs
    overlap_param_gather: bool = False  # gather parameters while the forward pass already runs
    overlap_tensor: bool = False  # run GEMMs and collectives of tensor ranks at once; on a GPU
    overlap_shared_experts: bool = False  # run shared experts while tokens travel
    overlap_expert_gradients: bool = False  # weight gradients of experts meanwhile; on a GPU
    bucket_parameters: Count | None = None  # reduced together; null: 40M, or 1M for each data rank
    dispatcher: Dispatcher = Dispatcher.alltoall  # how tokens travel to experts
    recompute: Recompute = Recompute.none  # activations computed again, not kept
    recompute_modules: list[RecomputeModule] | None = None  # for selective; None: mamba and moe
    recompute_method: RecomputeMethod = RecomputeMethod.uniform  # for full
    recompute_layers: Count = 1  # for full: layers of a group, or of a stage
    fsdp: bool = False  # split weights and gradients too, layer by layer; overlaps by itself

    @property
    def recomputed(self) -> list[RecomputeModule]:
        """Modules that `recompute=selective` means; by default the two that keep most of all."""
        if self.recompute is not Recompute.selective:
            return []
        if self.recompute_modules is None:
            return [RecomputeModule.mamba, RecomputeModule.moe]
        return self.recompute_modules
