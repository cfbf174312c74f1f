"""The choice of the next token: penalties, filters, and a draw that depends on seed and place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per sequence; equal generators draw equal tokens.

    The order is temperature, then top-k, then top-p on what top-k left.

    Args:
        logits: [B, V].
        temperature: divides the logits; 0 takes the most likely token (the first of equals).
        top_k: tokens that may be drawn, the most likely ones; those as likely as the last of them
            stay as well. 0: all.
        top_p: the smallest set of most likely tokens with at least this mass may be drawn; at
            least one token. 1: all.
        generator: source of randomness, on the device of the logits; None: the global one.

    Returns:
        Token ids, [B], int64.

    Raises:
        ValueError: if a setting is out of its range.

    Source: Fan et al., arXiv:1805.04833, section 5 (top-k); Holtzman et al., arXiv:1904.09751,
        section 3.1 (top-p).
    """
    if temperature < 0 or top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(
            f"temperature={temperature} and top_k={top_k} must not be negative, "
            f"top_p={top_p} must lie in [0, 1]"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = keep_top_p(keep_top_k(logits.float() / temperature, top_k), top_p)
    drawn = torch.multinomial(scaled.softmax(dim=-1), num_samples=1, generator=generator)
    return drawn.squeeze(-1)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` largest logits and equals of the last one, -inf elsewhere; [B, V]."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens with a mass of at least `top_p`, -inf elsewhere; [B, V].

    Of equally likely tokens the lower id goes first.
    """
    if top_p == 1:
        return logits
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(dim=-1)
    dropped = mass.cumsum(dim=-1) - mass >= top_p  # the tokens before it have the mass already
    dropped[..., 0] = False
    return logits.masked_fill(dropped.scatter(-1, token, dropped), -torch.inf)
