"""What generation is asked for, and what it answers: requests, their sampling, new tokens."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hybrid_train.generation.sampling import Sampling


class Finish(enum.StrEnum):
    """Why an answer is over."""

    end = enum.auto()  # one of the request's end tokens
    stop = enum.auto()  # its watcher said so, as at a stop string
    length = enum.auto()  # max_new_tokens


class Watcher(Protocol):
    """Sees the tokens of one answer as they are chosen; equal on all processes of a layout."""

    def forced(self) -> int | None:
        """Return the token that must come next, as at the end of a thinking budget; None: any."""

    def take(self, token: int) -> bool:
        """Take the next token, but not an end token; return whether the answer is over with it."""


class _Nothing:
    def forced(self) -> int | None:
        return None

    def take(self, token: int) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        sampling: how each next token is chosen.
        max_new_tokens: of the answer, its end token counted.
        ends: tokens each of which ends the answer; none: only the length does.
        watch: makes the watcher of this answer.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 128
    ends: frozenset[int] = frozenset()
    watch: Callable[[], Watcher] = _Nothing

    def __post_init__(self) -> None:
        if not self.prompt or min(self.prompt) < 0:
            raise ValueError(
                f"prompt = {list(self.prompt)}: needs at least one token, none negative"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """What a step of the model added to one answer.

    Attributes:
        request: its place in the order in which requests were given, from 0.
        tokens: new ones, in order; several where drafts were accepted. The token that ends the
            answer is among them.
        log_probs: of each, in nats, as the model has it (temperature 1, nothing left out).
        finish: why the answer is over; None while it goes on.
        drafted: drafts that were right or wrong; those behind the end of an answer are neither.
        accepted: of these.
    """

    request: int
    tokens: list[int]
    log_probs: list[float]
    finish: Finish | None = None
    drafted: int = 0
    accepted: int = 0
