"""Forward and backward passes of a step by Megatron's schedules, and the reduction of gradients.

And the capture of layers in CUDA graphs, which the passes replay. Core (0.19.2,
transformer/cuda_graphs.py, TECudaGraphHelper) has no caller of its own; the training loop is to
make these calls, in this order. They have never run: no GPU was at hand.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from hybrid_train.megatron.data_parallel import Chunks, ProcessGroups
from hybrid_train.megatron.optimizers import MegatronOptimizer
from hybrid_train.megatron.router import BalanceLosses, routers, update_expert_biases
from hybrid_train.runtime import heartbeat


def run_schedule(
    chunks: Chunks,
    forward_step: Callable[..., Any],
    batches: list[Any],
    *,
    shape: tuple[int, int],
    forward_only: bool,
    schedule: Callable[..., Any] | None = None,
) -> list[dict[str, Tensor]]:
    """Run all microbatches of a step through Megatron's schedule for this layout.

    Args:
        chunks: the model chunks of this process.
        forward_step: (iterator of microbatches, chunk) -> (output, loss function).
        batches: the microbatches.
        shape: sequences and tokens per sequence of a microbatch, [B, S].
        forward_only: no gradients.
        schedule: what takes the place of Megatron's, with its arguments.

    Returns:
        What the loss function reported for each microbatch; empty but on the last pipeline stage.
    """
    iterators: list[Iterator[Any]] = [iter(batches) for _ in chunks]
    run = schedule or get_forward_backward_func()
    reports: list[dict[str, Tensor]] = run(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=forward_only,
    )
    return reports


class Finalizer:
    """Megatron's reduction of gradients, which first notes how many tokens each expert got.

    The reduction updates the expert biases from these counts and then forgets them. Behind it the
    gradients are divided by `denominator`, a float, since core adds whole tokens only and takes no
    less than one of them (schedules.py 749, finalize_model_grads.py 693).
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._denominator: Tensor | None = None
        self.expert_counts: dict[tuple[bool, int], Tensor] = {}  # (in MTP, layer from 1) -> counts
        self._biases: list[tuple[Tensor, Tensor]] = []  # of each router, and a copy from before
        config.finalize_model_grads_func = self

    @property
    def denominator(self) -> Tensor:
        """Of the losses of the step, in all processes; it stays where captured steps read it."""
        assert self._denominator is not None, "nothing says what the gradients are divided by"
        return self._denominator

    @denominator.setter
    def denominator(self, value: Tensor) -> None:
        if self._denominator is None:
            self._denominator = value.clone()
        else:
            self._denominator.copy_(value)

    def __call__(self, chunks: Chunks, tokens: Tensor | None, **kwargs: Any) -> None:
        """Take the place of `finalize_model_grads`; `tokens` are core's own count."""
        heartbeat.enter(heartbeat.REDUCE)  # from here on processes wait for each other
        self.expert_counts, self._biases = {}, []
        counted = [(one, one.local_tokens_per_expert.clone()) for one in routers(chunks)]
        for router, tokens_of_experts in counted:  # MTP blocks of several depths share a place
            place = (router.is_mtp_layer, router.layer_number)
            self.expert_counts[place] = self.expert_counts.get(place, 0) + tokens_of_experts
            self._biases.append((router.expert_bias, router.expert_bias.clone()))
        finalize_model_grads(chunks, None, **kwargs)
        if counted:
            groups = kwargs["pg_collection"]
            rate = counted[0][0].config.moe_router_bias_update_rate
            update_expert_biases(counted, rate, groups.tp_dp_cp)
        for chunk in chunks:
            chunk.scale_gradients(1.0 / self.denominator)

    def restore_expert_biases(self) -> None:
        """Take back the update of the expert biases, of a step that turned out to be bad."""
        for bias, before in self._biases:
            bias.copy_(before)


def forget_loads(chunks: Chunks) -> None:
    """Forget the tokens of experts in passes that no reduction followed."""
    for module in routers(chunks):
        module.local_tokens_per_expert.zero_()


def captures_layers(chunks: Chunks) -> bool:
    """Tell whether the layers of a network are to be captured."""
    return bool(get_model_config(chunks[0]).cuda_graph_impl == "transformer_engine")


def capture_layers(
    chunks: Chunks,
    optimizer: MegatronOptimizer,
    groups: ProcessGroups,
    balance_losses: BalanceLosses,
    *,
    shape: tuple[int, int],
    global_batch: int,
) -> None:
    """Capture the graphable parts of all layers; from the next step on they are replayed.

    Args:
        chunks: the model chunks of this process.
        optimizer: theirs; its gradients are emptied by the capture.
        groups: the processes of the layout.
        balance_losses: the record of the routers, which a replay adds to without Python.
        shape: sequences and tokens per sequence of a microbatch, [B, S].
        global_batch: sequences of a step over all ranks.
    """
    balance_losses.stay_in_place(_device())
    config = get_model_config(chunks[0])
    _tell_microbatches(groups, shape[0], global_batch)
    hooked = [chunk for chunk in chunks if _gathers_in_hooks(chunk)]
    for chunk in hooked:  # Python that a replay would not run
        chunk.disable_forward_pre_hook(param_sync=False)
    helper = TECudaGraphHelper(
        model=chunks,
        config=config,
        seq_length=shape[1],
        micro_batch_size=shape[0],
        optimizers=[optimizer],
        pg_collection=groups,
    )
    helper.create_cudagraphs()
    for chunk in hooked:
        chunk.enable_forward_pre_hook()
    if hooked:
        helper.cuda_graph_set_manual_hooks()


def _tell_microbatches(groups: ProcessGroups, microbatch: int, global_batch: int) -> None:
    """Give core's global calculator the number that the helper asks it for."""
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        rank=dist.get_rank(),
        rampup_batch_size=None,
        global_batch_size=global_batch,
        micro_batch_size=microbatch,
        data_parallel_size=groups.dp.size(),
    )


def _gathers_in_hooks(chunk: Any) -> bool:
    settings = chunk.ddp_config
    return bool(settings.overlap_param_gather and settings.use_distributed_optimizer)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
