"""How far two heads are apart on the same tokens: the losses of distillation, and readings.

The other model, the *target*, is given by hidden states and its part of its head, so that its
logits exist for a chunk of tokens at a time as those of the model do; or by its most likely tokens.
With p of the target and q of the model, both at a temperature,

    KL(p || q) = sum_v p(v) * (log p(v) - log q(v)) = sum_v (q(v) - p(v) - p(v) * d(v))
    KL(q || p) = sum_v (p(v) - q(v) + q(v) * d(v)),   d = log q - log p

The last form of each sums terms that are not negative, so that of two models that are nearly equal
it is not the rounding of a difference of large sums: q - p is p * expm1(d).

Columns and their sums: `ops/distribution.py`; tokens that are told apart: `ops/top_entries.py`.

Sources: Hinton et al., arXiv:1503.02531, section 2 (temperature); Minitron, arXiv:2407.14679.

Dimensions: T tokens, N tokens of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.ops.distribution import Columns, Found, Gradient, toward
from hybrid_train.ops.logits import HeadPart, Pullback
from hybrid_train.ops.reference import Reference, Target, TopTokens
from hybrid_train.ops.top_entries import TopEntries


@dataclass(frozen=True)
class Distillation:
    """Draws the model to targets, and to its labels: a `Term` of its logits.

        loss = (1 - c) * t^2 * sum_k w_k * [(1 - r) * KL(p_k || q) + r * KL(q || p_k)] + c * CE

    Its values, [N, 3] or [N, 4], in float32 (float64 if the logits are): the loss; the divergence
    that (1 - c) multiplies; the cross-entropy of the labels; agreement, where it is asked for.

    Attributes:
        targets: each with its weight w_k; they get no gradient.
        labels: token ids in the whole vocabulary, [T].
        temperature: t, which divides the logits of both in the divergence.
        reverse_share: r.
        cross_entropy_share: c; the cross-entropy knows no temperature.
        top_k: of a reference, how many of its most likely tokens are told apart; all others are one
            entry on both sides. None: all are told apart.
        agreement: 1 where the model and the first target hold the same token for the most likely.
    """

    targets: Sequence[tuple[float, Target]]
    labels: Tensor
    temperature: float = 1.0
    reverse_share: float = 0.0
    cross_entropy_share: float = 0.0
    top_k: int | None = None
    agreement: bool = False

    @property
    def tensors(self) -> int:
        """How many of the size of its logits a chunk needs: theirs, and one target's."""
        return 2

    def __post_init__(self) -> None:
        """Refuse what stored tokens cannot say.

        Raises:
            ValueError: if they are asked for their probabilities at another temperature.
        """
        stored = any(isinstance(target, TopTokens) for _, target in self.targets)
        if stored and self.temperature != 1:
            raise ValueError(
                f"temperature {self.temperature}: stored tokens have the probabilities of "
                "temperature 1, and what is left for the others is not known at another"
            )

    def __call__(self, logits: Tensor, rows: slice, head: HeadPart) -> tuple[Tensor, Pullback]:
        """Return the values of a chunk and the pullback, see `Term`.

        The pullback overwrites the logits with their gradient.
        """
        model = Columns.of(logits, head, 1 / self.temperature)
        plain = model if self.temperature == 1 else Columns.of(logits, head, 1.0)
        column, here = head.columns_of(self.labels[rows])
        cross_entropy = plain.log_sum - head.logits_of(logits, column, here)
        chosen = head.greedy(logits) if self.agreement else None
        divergence, agrees = torch.zeros_like(cross_entropy), None
        kept, gradient = 1 - self.cross_entropy_share, Gradient()
        for weight, target in self.targets:
            view = self._view(target, rows, model)
            if chosen is not None and agrees is None:
                agrees = (view.greedy == chosen).to(divergence.dtype)
            found = view.compare(model, self.reverse_share)
            divergence += weight * self.temperature**2 * found.value
            gradient.add(found.gradient, kept * weight * self.temperature)
        share = self.cross_entropy_share
        if share:
            gradient.columns.append((column, (-share * here.to(plain.log_sum.dtype))[:, None]))
        values = [kept * divergence + share * cross_entropy, divergence, cross_entropy]
        values += [] if agrees is None else [agrees]
        return torch.stack(values, dim=-1), lambda weights: gradient.into(
            model, plain, share, weights
        )

    def _view(self, target: Target, rows: slice, model: "Columns") -> "_All | TopEntries":
        """Return what a target says of the tokens of a chunk, in the columns of this rank."""
        head = model.head
        if isinstance(target, TopTokens):
            return TopEntries.stored(target, rows, model)
        target.require_alike(head)
        theirs = Columns.of(target.logits(rows), target.head, model.scale)
        if self.top_k is None or self.top_k >= head.vocab_size:
            return _All(theirs)
        return TopEntries.of(theirs, self.top_k)


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
        model = Columns.of(logits, head, 1.0)
        view = _All(Columns.of(self.reference.logits(rows), self.reference.head, 1.0))
        same = view.greedy == head.greedy(logits)
        values = view.compare(model, 0.0).value
        return torch.stack([values, same.to(values.dtype)], dim=-1)


@dataclass(frozen=True)
class _All:
    """A target of which every token is told apart."""

    theirs: Columns

    @property
    def greedy(self) -> Tensor:
        return self.theirs.head.greedy(self.theirs.logits)

    def compare(self, model: Columns, reverse_share: float) -> Found:
        """Compare the model with it; its logits are overwritten.

        The gradient by logit v of KL(p || q) is q - p, of KL(q || p) q * (d - KL(q || p)).
        """
        theirs, r = self.theirs, reverse_share
        width, kind = model.head.width, model.kind
        beside = theirs.logits[:, :width].to(kind)
        sums = model.log_sum.new_zeros(2, len(model.log_sum))
        for block in model.blocks():
            log_p, log_q = theirs.log_probs(block), model.log_probs(block)
            d = log_q - log_p
            p = log_p.exp_()
            sums[0, block] = toward(p, d, log_q).sum(-1)
            part = p.mul_(r - 1) if r < 1 else torch.zeros_like(p)
            if r:
                sums[1, block] = toward(log_q.exp(), -d, log_q - d).sum(-1)
                part += log_q.exp_().mul_(d).mul_(r)
            beside[block] = part
        forward, backward = model.head.summed(sums)
        factors = (1 - r) - r * backward
        return Found((1 - r) * forward + r * backward, Gradient(factors, beside))
