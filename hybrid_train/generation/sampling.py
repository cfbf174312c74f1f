"""The choice of the next token: penalty, filters, and a draw that depends on seed and place.

Dimensions: R places, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybrid_train.data.order import GOLDEN, mix64
from hybrid_train.schema.limits import COLDEST

_FRACTION_BITS = 53  # of a float64: so many bits make an even fraction in [0, 1)
_Settings = tuple[float, float, int, float, float]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one answer are chosen; in this order, which is that of transformers.

    Attributes:
        repetition_penalty: divides the logits above 0 of tokens that prompt or answer have already
            and multiplies those below; 1: none.
        temperature: divides the logits; 0 takes the most likely token, the first of equals.
        top_k: so many of the most likely tokens may be drawn, and equals of the last; 0: all.
        top_p: the smallest set of most likely tokens with this mass may be drawn; 1: all.
        min_p: tokens may be drawn that have this share of the probability of the likeliest.
        seed: what is drawn follows from it.

    Source: Keskar et al., arXiv:1909.05858, section 4.1 (penalty); Fan et al., arXiv:1805.04833,
        section 5 (top-k); Holtzman et al., arXiv:1904.09751, section 3.1 (top-p); Nguyen et al.,
        arXiv:2407.01082, section 3 (min-p).
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        # A comparison with NaN is false.
        if not (
            0 < self.repetition_penalty < np.inf
            and (self.temperature == 0 or COLDEST <= self.temperature < np.inf)
            and self.top_k >= 0
            and 0 <= self.top_p <= 1
            and 0 <= self.min_p <= 1
            and 0 <= self.seed < 2**64
        ):
            raise ValueError(
                f"{self}: repetition_penalty must be above 0, temperature 0 or at least {COLDEST}, "
                "top_k not negative, top_p and min_p in [0, 1], seed in [0, 2^64)"
            )


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
    """Choose a token at each place; places with equal settings are computed together.

    Nothing is read back from the device of the logits.

    Args:
        logits: of the R places, [R, V].
        places: R of them.

    Returns:
        Token ids, [R], int64.
    """
    alike: dict[_Settings, list[int]] = {}
    for row, place in enumerate(places):
        alike.setdefault(_settings(place.sampling), []).append(row)
    if len(alike) == 1:
        return _choose_alike(logits, places)
    tokens = torch.empty(len(places), dtype=torch.int64, device=logits.device)
    for rows in alike.values():
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _choose_alike(logits[index], [places[row] for row in rows])
    return tokens


def _settings(one: Sampling) -> _Settings:
    """Return what decides a choice but the seed; a greedy one knows a penalty alone."""
    if one.temperature == 0:
        return one.repetition_penalty, 0.0, 0, 1.0, 0.0
    return one.repetition_penalty, one.temperature, one.top_k, one.top_p, one.min_p


def _choose_alike(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """Choose tokens at places whose settings differ by the seed alone."""
    one = places[0].sampling
    if one.repetition_penalty != 1:
        before = [place.before for place in places]
        logits = penalize_repeated(logits.float(), before, one.repetition_penalty)
    if one.temperature == 0:
        return logits.argmax(dim=-1)
    kept = keep_top_k(logits.float() / one.temperature, one.top_k)
    return draw(keep_min_p(keep_top_p(kept, one.top_p), one.min_p), fractions(places))


def penalize_repeated(logits: Tensor, before: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make tokens that were there before less likely, however often they were; [R, V].

    Args:
        logits: of R places.
        before: token ids before each place; those from V on have no logit.
        penalty: above 1 such tokens become less likely, below 1 more.
    """
    vocabulary = logits.shape[-1]
    repeated = torch.zeros(logits.shape, dtype=torch.bool)
    for row, tokens in enumerate(before):
        ids = torch.tensor(tokens, dtype=torch.int64)
        repeated[row, ids[ids < vocabulary]] = True
    less = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(repeated.to(logits.device, non_blocking=True), less, logits)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` largest logits and equals of the last one, -inf elsewhere; [R, V]."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens with a mass of at least `top_p`, -inf elsewhere; [R, V].

    At least one token stays. Of equally likely tokens the lower id goes first.
    """
    if top_p == 1:
        return logits
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(dim=-1)
    dropped = mass.cumsum(dim=-1) - mass >= top_p  # the tokens before it have the mass already
    dropped[..., 0] = False
    return logits.masked_fill(dropped.scatter(-1, token, dropped), -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep tokens with `min_p` of the probability of the likeliest, -inf elsewhere; [R, V]."""
    if min_p == 0:
        return logits
    mass = logits.softmax(dim=-1)
    return logits.masked_fill(mass < min_p * mass.amax(dim=-1, keepdim=True), -torch.inf)


def fractions(places: Sequence[Place]) -> Tensor:
    """Return the fraction in [0, 1) that seed and number of each place decide, [R], float64.

    A hash of both and no generator with a state: what one place gets depends on no other.
    """
    seeds = np.array([place.sampling.seed for place in places], dtype=np.uint64)
    numbers = np.array([place.number for place in places], dtype=np.uint64)
    # Seeds are mixed before numbers count on, else some seeds would repeat others a token later.
    mixed = mix64(mix64(seeds + GOLDEN) + (numbers + np.uint64(1)) * GOLDEN)
    return torch.from_numpy((mixed >> np.uint64(64 - _FRACTION_BITS)) * 2.0**-_FRACTION_BITS)


def draw(logits: Tensor, fraction: Tensor) -> Tensor:
    """Draw by the inverse of the distribution function, in float64.

    Args:
        logits: [R, V]; a token at -inf is never drawn.
        fraction: of the probability, in the order of the ids, that lies before the token or in it,
            [R], float64, each in [0, 1).

    Returns:
        Token ids, [R], int64.
    """
    wide = logits.double()
    weight = (wide - wide.amax(dim=-1, keepdim=True)).exp()
    reached = weight.cumsum(dim=-1)
    possible = weight > 0
    # The largest sum, and that of tokens of which there is something: a GPU adds in an order in
    # which the sums of two neighbours may fall by a last bit.
    total = reached.masked_fill(~possible, 0).amax(dim=-1, keepdim=True)
    target = fraction.to(logits.device, non_blocking=True)[:, None] * total
    return ((reached > target) & possible).to(torch.int8).argmax(dim=-1)
