"""Forward and backward passes of a step by Megatron's schedules, and the reduction of gradients."""

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hybrid_train.megatron.data_parallel import Chunks
from hybrid_train.megatron.router import routers, update_expert_biases
from hybrid_train.runtime import heartbeat


def run_schedule(
    chunks: Chunks,
    forward_step: Callable[..., Any],
    batches: list[Any],
    *,
    shape: tuple[int, int],
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """Run all microbatches of a step through Megatron's schedule for this layout.

    Args:
        chunks: the model chunks of this process.
        forward_step: (iterator of microbatches, chunk) -> (output, loss function).
        batches: the microbatches.
        shape: sequences and tokens per sequence of a microbatch, [B, S].
        forward_only: no gradients.

    Returns:
        What the loss function reported for each microbatch; empty but on the last pipeline stage.
    """
    iterators: list[Iterator[Any]] = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=forward_only,
    )


class Finalizer:
    """Megatron's reduction of gradients, which first notes how many tokens each expert got.

    The reduction updates the expert biases from these counts and then forgets them. Behind it the
    gradients are divided by `denominator`, a float, since core adds whole tokens only and takes no
    less than one of them (schedules.py 749, finalize_model_grads.py 693).
    """

    denominator: Tensor  # of the losses of the step, in all processes

    def __init__(self, config: TransformerConfig) -> None:
        self.expert_counts: dict[tuple[bool, int], Tensor] = {}  # (in MTP, layer from 1) -> counts
        self._biases: list[tuple[Tensor, Tensor]] = []  # of each router, and a copy from before
        config.finalize_model_grads_func = self

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
