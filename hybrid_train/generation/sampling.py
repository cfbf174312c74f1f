"""The choice of the next token: penalties, filters, and a draw that depends on seed and place."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hybrid_train.generation.decode import sample


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one answer are chosen; in this order."""

    repetition_penalty: float = 1.0
    temperature: float = 0.0  # 0: the most likely token, the first of equals
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1234


@dataclass(frozen=True)
class Place:
    """Where in an answer a token is chosen.

    Attributes:
        sampling: how.
        number: of the token in its answer, from 0; with the seed it decides the draw, so that an
            answer does not depend on what else is in the batch, nor on drafts.
        before: tokens of prompt and answer before it; asked for where a penalty reads them.
    """

    sampling: Sampling
    number: int
    before: Sequence[int]


def choose(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """Choose a token at each place: logits [R, V] of R places -> [R], int64."""
    first = places[0].sampling
    return sample(logits, temperature=first.temperature, top_k=first.top_k, top_p=first.top_p)
