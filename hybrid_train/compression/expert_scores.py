"""What of the experts of a layer is scored while they run: each of them, and its inner neurons.

Experts get tokens of many ranks and rows, sorted by expert, and nobody tells them whose these are.
Those that do not count, as padding, are marked by the sign of their router weights on the way: the
weights of the family are sums of sigmoids, never below 0, and are put right before anyone reads
them.

    output     mean over the tokens of an expert of |router weight x output of the expert|
    without    mean over all tokens of |y - y'|^2 / H, y' what the layer gives where no token can
               choose the expert

The output of an expert that works in a latent space is taken there.

Sources: REAP, arXiv:2510.13999; Puzzle, arXiv:2411.19146 (a layer without an expert).

Dimensions: T tokens that came to the experts of this rank, E experts, F inner neurons on this rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import Module

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import Layer
from hybrid_train.compression.ranking import name_of
from hybrid_train.compression.scores import Ledger, Part, Spec, moments, num_moments, of_tokens
from hybrid_train.megatron.data_parallel import ProcessGroups
from hybrid_train.model.edits import watch_input
from hybrid_train.schema.importance import ExpertMetric, OverTokens

Undo = Callable[[], None]


def expert_specs(layer: Layer, over: OverTokens) -> Mapping[str, Spec]:
    """Return what is summed up of the experts of a layer."""
    experts, inner = layer.sizes.experts, layer.sizes.expert_ffn
    return {
        name_of(layer, Axis.experts): Spec(
            (experts,), (experts,), lambda sums, counts: sums / counts.clamp(min=1)
        ),
        name_of(layer, Axis.expert_ffn): Spec(
            (num_moments(over), experts, inner),
            (experts,),
            lambda sums, counts: of_tokens(sums, counts, over),
        ),
    }


class ExpertScores:
    """Sums up what the experts of one layer show."""

    def __init__(
        self,
        layer: Layer,
        mlp: Module,
        ledger: Ledger,
        groups: ProcessGroups,
        *,
        over: OverTokens,
        metric: ExpertMetric,
        counted: Callable[[], Tensor],
    ) -> None:
        """Take the layer.

        Args:
            layer: its place and sizes.
            mlp: its router and experts.
            ledger: where sums go.
            groups: of the layout.
            over: how inner neurons are scored.
            metric: how experts are.
            counted: which tokens of the pass that runs count, [S, B], bool, on this context rank.
        """
        self._mlp, self._ledger, self._groups = mlp, ledger, groups
        self._over, self._metric, self._counted = over, metric, counted
        self._number, self._is_busy = layer.sizes.experts, False
        self._inside: tuple[list[int], Tensor] | None = None  # tokens of each expert; which count
        here = layer.sizes.experts // groups.ep.size()
        own = slice(groups.ep.rank() * here, (groups.ep.rank() + 1) * here)
        width = layer.sizes.expert_ffn // groups.expt_tp.size()
        rank = groups.expt_tp.rank()
        tells = rank == 0  # ranks that share an expert have the same tokens
        self._experts = Part(name_of(layer, Axis.experts), (own,), (own,), tells, tells)
        self._all = Part(name_of(layer, Axis.experts))
        columns = slice(rank * width, (rank + 1) * width)
        self._inner = Part(
            name_of(layer, Axis.expert_ffn), (slice(None), own, columns), (own,),
            tells_counts=tells,
        )  # fmt: skip

    def watch(self) -> list[Undo]:
        """Listen from now on; return what ends it."""
        mlp: Any = self._mlp
        handles = [
            mlp.router.register_forward_hook(self._mark),
            mlp.experts.register_forward_pre_hook(self._enter),
            mlp.experts.register_forward_hook(self._leave),
        ]
        if self._metric is ExpertMetric.without:
            handles.append(mlp.register_forward_hook(self._try_without, with_kwargs=True))
        return [
            *(handle.remove for handle in handles),
            watch_input(mlp.experts.linear_fc2, self._see_inner),
        ]

    def _own(self, tokens: int) -> Tensor:
        """Return which of the tokens of this rank count, [T], sequence before batch."""
        counted = self._counted()
        if counted.numel() > tokens:  # tensor ranks share the sequence
            counted = counted.chunk(self._groups.tp.size())[self._groups.tp.rank()]
        return counted.flatten()

    def _mark(self, _: Module, __: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weights, chosen = output
        counts = self._own(len(weights))[:, None]
        return torch.where(counts, weights, -weights), chosen

    def _enter(self, _: Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, per_expert, weights, *others = arguments
        counts = ~torch.signbit(weights)
        self._inside = ([int(one) for one in per_expert.tolist()], counts)
        return (tokens, per_expert, weights.abs(), *others)

    def _by_expert(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sum values [K, T, C] over the tokens of each expert: [K, E, C]; and count these, [E]."""
        assert self._inside is not None, "no tokens came"
        sizes, counts = self._inside
        values = torch.where(counts[:, None], values, 0.0)
        sums = [part.sum(dim=1, dtype=torch.float64) for part in values.split(sizes, dim=1)]
        numbers = [part.sum() for part in counts.split(sizes)]
        return torch.stack(sums, dim=1), torch.stack(numbers)

    def _see_inner(self, inner: Tensor) -> None:
        if not self._is_busy:
            self._ledger.add(self._inner, *self._by_expert(moments(inner, self._over)))

    def _leave(self, _: Module, __: Any, output: tuple[Tensor, Any]) -> None:
        if self._is_busy or self._metric is not ExpertMetric.output:
            return
        whole = output[0].float()
        if self._groups.expt_tp.size() > 1:  # each rank has a part of every sum
            whole = whole.clone()
            dist.all_reduce(whole, group=self._groups.expt_tp)
        norms = torch.linalg.vector_norm(whole, dim=-1, keepdim=True)
        sums, counts = self._by_expert(norms[None])
        self._ledger.add(self._experts, sums[0, :, 0], counts)

    def _try_without(
        self, mlp: Any, arguments: Any, named: Mapping[str, Any], output: tuple[Tensor, Any]
    ) -> None:
        """Run the layer again and again, each time without one expert."""
        if self._is_busy:
            return
        whole, before = output[0].float(), mlp.router.kept
        counts = self._own(whole[..., 0].numel()).view(whole.shape[:-1])
        errors = []
        self._is_busy = True
        try:
            for others in ~torch.eye(self._number, dtype=torch.bool, device=whole.device):
                mlp.router.kept = others if before is None else others & before
                rest = mlp(*arguments, **named)[0].float()
                apart = torch.where(counts, (rest - whole).square().mean(dim=-1), 0.0)
                errors.append(apart.sum(dtype=torch.float64))
        finally:
            self._is_busy, mlp.router.kept = False, before
        repeated = self._groups.tp.rank() > 0 and counts.numel() == self._counted().numel()
        if not repeated:
            tokens = counts.sum().expand(len(errors))
            self._ledger.add(self._all, torch.stack(errors), tokens)
