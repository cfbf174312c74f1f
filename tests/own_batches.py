"""An objective that makes batches of those that it is given, for the tests."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hybrid_train.data.batch import Batch
from hybrid_train.data.loader import BatchSource
from hybrid_train.schema import objective
from hybrid_train.training.next_token import NextToken


@dataclass(kw_only=True)
class Settings(objective.NextToken):
    """Of an objective with batches of its own."""

    implementation: ClassVar[str] = "tests.own_batches:Remembered"
    kind: str = "tests.own_batches:Settings"


class Shifted:
    """Adds to each token what the tokens before it came to; so it must be kept over a restart."""

    def __init__(self, usual: BatchSource) -> None:
        self._usual, self._sum, self._made = usual, 0, 0

    @property
    def global_batch(self) -> int:
        return self._usual.global_batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._usual)
        shift = self._sum % 50
        self._sum += int(batch.tokens.sum())
        self._made += 1
        tokens, labels = ((one + shift) % 50 for one in (batch.tokens, batch.labels))
        return replace(batch, tokens=tokens, labels=labels)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "made": self._made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._made = state["sum"], state["made"]


class Remembered(NextToken):
    """The loss of the next token on shifted batches."""

    def batches(self, usual: BatchSource) -> BatchSource:
        return Shifted(usual)
