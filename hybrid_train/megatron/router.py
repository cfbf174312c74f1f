"""The router of expert layers: Megatron-Core's, with the family's weights and our records.

Core 0.19.2 sums balance losses of everything in the process in one table (router.py 596), which has
one slot per MTP depth, though a depth may hold several layers: an IndexError with "*E*E/*E"
(Megatron-LM#7172). Two networks of one process would share it. Here each network has a record.

Dimensions: S tokens of a row on this rank, B rows, T = S * B tokens, E experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe import router as core
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    get_updated_expert_bias,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)
from torch import Tensor
from torch.nn import functional


class BalanceLosses:
    """What one network knows of the balance losses of its expert layers in a step.

    Attributes:
        scale: what the gradient of a balance loss is multiplied by. Core divides it by what the
            main loss is divided by, and a mean over tokens has to stay one.
    """

    def __init__(self) -> None:
        self._scale: Tensor | None = None
        self._sum: Tensor | None = None
        self._stays = False

    @property
    def scale(self) -> Tensor | None:
        return self._scale

    @scale.setter
    def scale(self, value: Tensor | None) -> None:
        if self._stays and self._scale is not None and value is not None:
            self._scale.copy_(value)
        else:
            self._scale = value

    def stay_in_place(self, device: torch.device) -> None:
        """Keep sum and scale in the memory that a captured graph adds to and reads from."""
        self._stays = True
        self._sum = torch.zeros((), device=device)
        self._scale = None if self._scale is None else self._scale.clone()

    def record(self, value: Tensor) -> None:
        """Add the unweighted loss of one layer and microbatch; validation is not recorded."""
        if not torch.is_grad_enabled():
            return
        value = value.detach()
        if self._sum is None:
            self._sum = value
        elif self._stays:
            self._sum.add_(value)
        else:
            self._sum = self._sum + value

    def take(self) -> Tensor | None:
        """Return the sum since the last call, and forget it; None if nothing was recorded.

        A sum that stays in place is 0 then: replayed graphs add to it and say nothing.
        """
        found = self._sum
        if found is None or not self._stays:
            self._sum = None
            return found
        taken = found.clone()
        found.zero_()
        return taken


class TopKRouter(core.TopKRouter):
    """Core's router, which tells its balance loss to the record of its network.

    It has core's name, by which Megatron-FSDP knows that its weights are not split over tensor
    ranks (mcore_fsdp_adapter.py 90).

    Attributes:
        kept: experts that are there for the choice, [E], bool; None: all; set by edits.
    """

    kept: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Core stacks the biases of all routers (finalize_model_grads.py 361), and layers may have
        # different numbers of experts: `update_expert_biases` stands for that.
        self.frozen_expert_bias = True
        self.balance_losses = BalanceLosses()  # of its own, until it is given that of its network

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts and their weights: logits [S, B, E] -> weights and choices, [T, E] each.

        Core's steps for this family (router.py 742).

        Args:
            logits: of the gate.
            padding_mask: tokens that do not count, [S, B].
        """
        length, rows = logits.shape[:2]
        logits = logits.view(-1, self.config.num_moe_experts)
        if self.kept is not None:
            logits = logits.masked_fill(~self.kept, -torch.inf)  # a score of 0, and no gradient
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        weights, chosen = self._choose(logits)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            unbiased, scores = compute_routing_scores_for_aux_loss(
                *(logits, self.topk, self.score_function),
                fused=self.config.moe_router_fusion,
                padding_mask=padding,
            )
            weights = self._apply_seq_aux_loss(
                weights, scores, unbiased, length, rows, with_padding_mask=padding is not None
            )
        self._apply_expert_bias(chosen, padding)
        return weights, chosen

    def as_lists(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts of tokens [T, H], as `routing`, in lists: weights and numbers, [T, k].

        The rule of the family and nothing else: core's questions cost a token as much.
        """
        scores = functional.linear(x.float(), self.weight.float()).sigmoid_()
        chosen = torch.topk(scores + self._bias_of_choice, self.topk)[1]
        weights = scores.gather(1, chosen)
        weights.div_(weights.sum(dim=-1, keepdim=True).add_(1e-20))
        scale = self.config.moe_router_topk_scaling_factor
        return (weights if scale is None else weights.mul_(scale)), chosen

    @property
    def _bias_of_choice(self) -> Tensor:
        """What is added to scores where experts are chosen, [E]."""
        bias: Tensor = self.expert_bias
        return bias if self.kept is None else bias.masked_fill(~self.kept, -torch.inf)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the chosen experts as the family does, in one order.

        Without gradients, as in the first pass of a recomputed layer, core leaves the experts
        unsorted (moe_utils.py 823): sums over them would differ in the last bit. And the weight of
        a single one it does not divide by itself (868), which config.json says of the family
        (norm_topk_prob).
        """
        scale = self.config.moe_router_topk_scaling_factor
        with torch.enable_grad():  # scores that were made without carry none: no graph is kept
            weights, chosen = topk_routing_with_score_function(
                logits,
                self.topk,
                scaling_factor=scale if self.topk > 1 else None,
                score_function=self.score_function,
                expert_bias=self._bias_of_choice,
                fused=self.config.moe_router_fusion,
            )
            if self.topk == 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
                weights = weights * (scale or 1.0)
        return weights, chosen

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count tokens; core lays a mask [T] against a map [T, E] (router.py 738)."""
        mask = None if padding_mask is None else padding_mask.unsqueeze(-1)
        super()._apply_expert_bias(routing_map, padding_mask=mask)

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the balance loss of each row to the weights, and record it (router.py 458)."""
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if coefficient == 0:
            return probs
        counts, own, total = get_tokens_per_expert_and_token_count(
            routing_map=routing_map.reshape(seq_length, -1),
            reduce_group=self.tp_cp_group,
            topk=self.topk * bsz,
            with_padding_mask=with_padding_mask,
        )
        if with_padding_mask:
            total = total.clamp(min=1)
            own = self._share(own, total)
            counts = self._as_shares_of_rows(counts, total)
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss.reshape(seq_length, -1),
            tokens_per_expert=counts,
            total_num_tokens=total,
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coefficient,
            # The kernel takes a whole number of tokens; padded rows have a mean.
            fused=self.config.moe_router_fusion and not with_padding_mask,
        )
        if self.kept is not None:  # the loss is proportional to the number of experts
            loss = loss * (self.kept.sum() / self.kept.numel())
        return self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            loss / bsz,
            "seq_load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=own * bsz,
        )

    def _share(self, own: Tensor, total: Tensor) -> Tensor:
        """Return how many tokens of padded rows this rank is taken to have.

        Core multiplies the gradient of the balance loss with the tokens of this rank and divides it
        by those of the whole step (router.py 632). That is right where all ranks have the same
        number; of those that share padded rows one has less, so each is given the mean.
        """
        return total / self.tp_cp_group.size()

    def _as_shares_of_rows(self, counts: Tensor, total: Tensor) -> Tensor:
        """Divide the counts of each row, [B * E], by the tokens of that row.

        Core takes every row for one of mean length (moe_utils.py 141). So the gradient is the same
        for every size of microbatch: it is multiplied with the tokens of the microbatch, and a row
        counts by its tokens.
        """
        rows = counts.unflatten(0, (-1, self.config.num_moe_experts))
        tokens = (rows.sum(dim=1, keepdim=True) / self.topk).clamp(min=1)
        return (rows * (total / tokens)).flatten()

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
    for router in routers(chunks):
        router.balance_losses = record
    return record


def routers(chunks: Iterable[torch.nn.Module]) -> Iterator[TopKRouter]:
    """Yield the routers of model chunks, whatever these are wrapped in."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                yield module


@torch.no_grad()
def update_expert_biases(
    counted: Sequence[tuple[TopKRouter, Tensor]], rate: float, group: Any
) -> None:
    """Raise the bias of experts with less than the mean of tokens, and lower it of those with more.

    Source: arXiv:2408.15664, section 3; core's update, for all layers of so many experts at once.

    Args:
        counted: routers and the tokens of each expert on this process, [E].
        rate: of the update.
        group: the processes whose tokens count together.
    """
    by_number: dict[int, list[tuple[TopKRouter, Tensor]]] = {}
    for router, counts in counted:
        if router.training:
            by_number.setdefault(router.config.num_moe_experts, []).append((router, counts))
    for number in sorted(by_number):
        ones = by_number[number]
        totals = torch.stack([counts for _, counts in ones])  # core sums them up in place
        updated = get_updated_expert_bias(
            totals,
            torch.stack([router.expert_bias for router, _ in ones]),
            rate,
            tp_dp_cp_group=group,
        )
        for (router, _), total, bias in zip(ones, totals, updated, strict=True):
            router.expert_bias.copy_(
                bias if router.kept is None else _updated_where(router.kept, router, total, rate)
            )


def _updated_where(kept: Tensor, router: TopKRouter, tokens: Tensor, rate: float) -> Tensor:
    """Update the biases of those experts that are there, by the mean of their tokens."""
    towards = torch.sign(tokens.sum() / kept.sum() - tokens)
    updated: Tensor = router.expert_bias + towards * kept * rate
    return updated
