"""How far two heads are apart on the same tokens: Kullback-Leibler divergence, equal choices.

As a `Term` the divergence is a loss that draws a model to a reference, as in distillation; as a
`Reading` it is looked at. The reference is given by hidden states and its part of its head, so its
logits exist for a chunk of tokens at a time, as those of the model do.

    KL(reference || model) = sum_v p(v) * (log p(v) - log q(v))
                           = sum_v (q(v) - p(v) - p(v) * d(v)),   d = log q - log p

The second form sums terms that are not negative, so that of two models that are nearly equal it is
not the rounding of a difference of large sums.

Dimensions: T tokens, N tokens of a chunk, H hidden units of the reference, V rows of a head, V/tp
those of one rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.ops.linear import gemm
from hybrid_train.ops.logits import HeadPart, Pullback, Softmax

_SMALL = 0.5  # of d: below it exp(d) - 1 - d is exact as expm1(d) - d, above as it stands


@dataclass(frozen=True)
class Reference:
    """What another model makes of the same tokens.

    Attributes:
        hidden: in the order of the model's tokens, all of them on every tensor rank, [T, H].
        head: this rank's rows of its head; the same tokens as the rows of the model's.
    """

    hidden: Tensor
    head: HeadPart

    def logits(self, rows: slice) -> Tensor:
        """Return the logits of a chunk, [N, V/tp]."""
        return gemm(self.hidden[rows], self.head.weight)

    def require_alike(self, head: HeadPart) -> None:
        """Refuse a head whose rows on this rank are other tokens.

        Raises:
            ValueError: if it has another vocabulary, or another padding of it over several ranks.
        """
        mine, other = ((one.vocab_size, one.first, one.width) for one in (head, self.head))
        if mine != other:
            raise ValueError(
                f"the heads do not have the same tokens here: {other[2]} from {other[1]} of "
                f"{other[0]} in the reference, {mine[2]} from {mine[1]} of {mine[0]} in the model"
            )


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) of the next token, in nats: a `Term` of the model's logits.

    Attributes:
        reference: of the same tokens; it gets no gradient.
    """

    reference: Reference

    def __call__(self, logits: Tensor, rows: slice, head: HeadPart) -> tuple[Tensor, Pullback]:
        """Return the values of a chunk, [N] in float32 (float64 if the logits are), see `Term`.

        The gradient by logit v is q(v) - p(v).
        """
        self.reference.require_alike(head)
        theirs = self.reference.logits(rows)
        target, found = self.reference.head.softmax(theirs), head.softmax(logits)
        values = divergence(theirs, target, logits, found, head)
        wanted = target.scaled(torch.ones_like(values))[:, None] * target.probs

        def pullback(weights: Tensor) -> Tensor:
            out = found.probs.new_zeros(logits.shape)
            difference = found.probs * found.scaled(weights)[:, None] - wanted * weights[:, None]
            out[:, : head.width] = difference
            return out.to(logits.dtype)

        return values, pullback


@dataclass(frozen=True)
class Comparison:
    """What a reference and a model say of the next token: a `Reading` of the model's logits.

    Its values are KL(reference || model), nats, and 1 where both hold the same token for the most
    likely one.

    Attributes:
        reference: of the tokens that are read.
    """

    reference: Reference

    @property
    def num_values(self) -> int:
        return 2

    def __call__(self, logits: Tensor, rows: slice, head: HeadPart) -> Tensor:
        self.reference.require_alike(head)
        theirs = self.reference.logits(rows)
        target, found = self.reference.head.softmax(theirs), head.softmax(logits)
        values = divergence(theirs, target, logits, found, head)
        same = self.reference.head.greedy(theirs) == head.greedy(logits)
        return torch.stack([values, same.to(values.dtype)], dim=-1)


def divergence(
    theirs: Tensor, target: Softmax, logits: Tensor, found: Softmax, head: HeadPart
) -> Tensor:
    """Return KL(target || found) of each token of a chunk, over all ranks, [N].

    Args:
        theirs: logits of the reference, [N, V/tp].
        target: their distribution.
        logits: of the model, [N, V/tp].
        found: their distribution.
        head: of the model.
    """
    kind, ones = found.probs.dtype, torch.ones_like(found.log_sum)
    p = target.probs * target.scaled(ones)[:, None]
    q = found.probs * found.scaled(ones)[:, None]
    log_p = theirs[:, : head.width].to(kind) - target.log_sum[:, None]
    log_q = logits[:, : head.width].to(kind) - found.log_sum[:, None]
    d = log_q - log_p
    near = d.abs() < _SMALL
    close = p * (torch.expm1(d.where(near, 0.0)) - d)
    return head.summed(torch.where(near, close, q - p - p * d).sum(dim=-1))
