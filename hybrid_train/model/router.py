"""The router of expert layers: Megatron-Core's, with a balance loss of its own network.

Core 0.19.2 sums balance losses of everything in the process in one table (router.py 596), which has
one slot per MTP depth, though a depth may hold several layers: an IndexError with "*E*E/*E"
(Megatron-LM#7172). Two networks of one process would share it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.moe import router as core
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor


class BalanceLosses:
    """What one network knows of the balance losses of its expert layers in a step.

    Attributes:
        scale: what the gradient of a balance loss is multiplied by. Core divides it by what the
            main loss is divided by, and a mean over tokens has to stay one.
    """

    def __init__(self) -> None:
        self.scale: Tensor | None = None
        self._sum: Tensor | None = None

    def record(self, value: Tensor) -> None:
        """Add the unweighted loss of one layer and microbatch; validation is not recorded."""
        if torch.is_grad_enabled():
            value = value.detach()
            self._sum = value if self._sum is None else self._sum + value

    def take(self) -> Tensor | None:
        """Return the sum since the last call, and forget it; None if nothing was recorded."""
        found, self._sum = self._sum, None
        return found


class TopKRouter(core.TopKRouter):
    """Core's router, which tells its balance loss to the record of its network.

    It has core's name, by which Megatron-FSDP knows that its weights are not split over tensor
    ranks (mcore_fsdp_adapter.py 90).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balance_losses = BalanceLosses()  # of its own, until it is given that of its network

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        needs_dp_avg: bool = True,
        valid_token_count: int | Tensor | None = None,
    ) -> Tensor:
        """Add the gradient of the balance loss to that of `activation`, and record the loss.

        As core does where losses are divided by the tokens of the whole step (router.py 543).
        """
        config = self.config
        if self.is_mtp_layer and config.mtp_use_repeated_layer and config.mtp_num_layers:
            aux_loss = aux_loss / config.mtp_num_layers  # one block serves all depths
        self.balance_losses.record(aux_loss / aux_loss_coeff)
        tokens = activation.shape[0] if valid_token_count is None else valid_token_count
        aux_loss = aux_loss * tokens * self.tp_cp_group.size()
        if self.balance_losses.scale is not None:
            aux_loss = aux_loss * self.balance_losses.scale
        attached: Tensor = MoEAuxLossAutoScaler.apply(activation, aux_loss)
        return attached


def share_record(chunks: Sequence[torch.nn.Module]) -> BalanceLosses:
    """Give all routers of a network's chunks on this process one record, and return it."""
    record = BalanceLosses()
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.balance_losses = record
    return record
