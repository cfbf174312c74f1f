"""An objective of two networks that take turns, for the tests; it needs a process."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from hybrid_train.data.batch import Batch
from hybrid_train.training.next_token import NextToken
from hybrid_train.training.objective import Given, LossFunction, Objective, Turn


class InTurns(Objective):
    """Each network learns the next token; the first may be asked to please the second, too."""

    def __init__(self, settings: Any, given: Given) -> None:
        other = given.networks["second"] if settings.joined else None
        turns = {name: _OneOf(name, settings, given) for name in settings.order.split()}
        if other is not None:
            turns["first"].other = other.chunks[0]
        self._turns = tuple(Turn(turn, name) for name, turn in turns.items())
        self.names = tuple(name for turn in turns.values() for name in turn.names)

    @property
    def turns(self) -> Sequence[Turn]:
        return self._turns


class _OneOf(NextToken):
    """Next-token loss of one network, and what the layers of `other` make of it."""

    other: Module | None = None

    def __init__(self, name: str, settings: Any, given: Given) -> None:
        super().__init__(settings, given)
        self.names = ("loss",) if name == "first" else (f"term/{name}",)

    def forward(self, model: Module, batch: Batch, totals: Tensor) -> tuple[Tensor, LossFunction]:
        output, loss_of = super().forward(model, batch, totals)
        if self.other is None:
            return output, loss_of
        other = self.other

        def of_both(output: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, count, report = loss_of(output)
            length, rows = batch.tokens.t().shape
            shape = (length, rows, other.config.hidden_size)
            places = torch.arange(length * rows * shape[2]).view(shape)
            states = torch.sin(places) + loss * torch.cos(places)
            return (
                loss + other.module.decoder(states, attention_mask=None)[..., 0].sum(),
                count,
                report,
            )

        return output, of_both
