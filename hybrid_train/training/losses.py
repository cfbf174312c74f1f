"""A pass of an objective over microbatches: the losses of its terms and of each source."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_train.data.batch import Batch
from hybrid_train.megatron.forward_backward import run_schedule
from hybrid_train.runtime import progress
from hybrid_train.training.network import Network
from hybrid_train.training.objective import Objective


@dataclass(frozen=True)
class Losses:
    """Sums of the terms of the objective, then of each source that is told apart.

    Attributes:
        names: of the metrics, [terms + sources].
        sums: of this process, [terms + sources].
        totals: weights in all processes that divide them, [terms + sources].
        drawn: labels of each source in all processes.
    """

    names: tuple[str, ...]
    sums: Tensor
    totals: Tensor
    drawn: dict[str, int]

    def means(self, sums: Tensor) -> dict[str, float]:
        """Divide sums over all processes; a term or source without any weight has no loss."""
        pairs = zip(self.names, sums.tolist(), self.totals.tolist(), strict=True)
        return {name: value / total for name, value, total in pairs if total}


def run(
    network: Network,
    objective: Objective,
    microbatches: list[Batch],
    *,
    shape: tuple[int, int],
    sources: Sequence[str] = (),
    forward_only: bool,
) -> Losses:
    """Run the objective over a network; every process calls this.

    Args:
        network: what is run, and has the gradients then.
        objective: its terms.
        microbatches: this process's part of them.
        shape: sequences and tokens per sequence of a microbatch, [B, S].
        sources: names; losses of the first term are told apart where there are several.
        forward_only: no gradients.
    """
    sources = sources if len(sources) > 1 else ()
    terms = objective.count(microbatches)
    weights, labels = _by_source(microbatches, len(sources), terms)
    counts = torch.cat([terms, weights, labels])
    dist.all_reduce(counts, group=network.groups.dp_cp)
    told = len(terms) + len(sources)
    if not forward_only:
        network.normalise(counts[0], counts[-1])

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
        progress.enter(progress.last().part)  # still there
        return objective.forward(model, next(iterator), counts[: len(terms)])

    reports = run_schedule(
        network.chunks, forward_step, microbatches, shape=shape, forward_only=forward_only
    )
    sums = torch.zeros_like(counts[:told])
    if reports and network.groups.tp.rank() == 0:  # tensor ranks hold the same losses
        sums[: len(terms)] += torch.stack([report["sums"] for report in reports]).sum(dim=0)
        for batch, report in zip(microbatches, reports, strict=True):
            _add(sums[len(terms) :], batch, report["rows"])
    names = (*objective.names, *(f"loss/{name}" for name in sources))
    drawn = dict(zip(sources, map(int, counts[told:-1].tolist()), strict=True))
    return Losses(names, sums, counts[:told], drawn)


def _by_source(microbatches: Sequence[Batch], sources: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the weights of each source, [sources], and count the labels that have one.

    Returns:
        Weights, and labels of each source and of all, [sources + 1].
    """
    weights, labels = like.new_zeros(sources), like.new_zeros(sources + 1)
    for batch in microbatches:
        weighed = (batch.loss_weights != 0).sum(dim=1).to(like.dtype)
        _add(weights, batch, batch.loss_weights.sum(dim=1))
        _add(labels[:-1], batch, weighed)
        labels[-1] += weighed.sum()
    return weights, labels


def _add(by_source: Tensor, batch: Batch, rows: Tensor) -> None:
    """Add a figure of each row of a microbatch, [B], to that of its source."""
    if len(by_source) and batch.source is not None:
        by_source.index_add_(0, batch.source, rows)
