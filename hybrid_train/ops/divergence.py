"""How far two heads are apart on the same tokens: the losses of distillation, and readings.

The other model, the *target*, is given by hidden states and its part of its head, so that its
logits exist for a chunk of tokens at a time as those of the model do; or by its most likely tokens.
With p of the target and q of the model, both at a temperature,

    KL(p || q) = sum_v p(v) * (log p(v) - log q(v)) = sum_v (q(v) - p(v) - p(v) * d(v))
    KL(q || p) = sum_v (p(v) - q(v) + q(v) * d(v)),   d = log q - log p

The last form of each sums terms that are not negative, so that of two models that are nearly equal
it is not the rounding of a difference of large sums: q - p is p * expm1(d).

Every rank has some columns of the vocabulary. What a token needs of all of them are sums, by plain
all-reduces; the gradient of a column needs nothing but its own p and q and these sums.

Sources: Hinton et al., arXiv:1503.02531, section 2 (temperature); Minitron, arXiv:2407.14679.

Dimensions: T tokens, N tokens of a chunk, n tokens of a block, H hidden units of a target, V rows
of a head, V/tp those of one rank, K tokens of a target that are told apart.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_train.ops.logits import HeadPart, Pullback
from hybrid_train.ops.reference import Reference, Target, TopTokens

_LARGE = 60.0  # of d: with more, p is nearly 0 in float32; exp() of it is finite
# Elements of a block, which is computed at once: 4 MB in float32, so that what it computes stays in
# a cache, and adds little to the logits of a chunk.
_BLOCK_ELEMENTS = 2**20
# On a GPU every operation of a block is a launch of a kernel: about 5 us, in which 2**20 elements
# are long done. 64 MB in float32; calculated, it has not run on a GPU.
_GPU_BLOCK_ELEMENTS = 2**24


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
        model = _Columns.of(logits, head, 1 / self.temperature)
        plain = model if self.temperature == 1 else _Columns.of(logits, head, 1.0)
        column, here = head.columns_of(self.labels[rows])
        cross_entropy = plain.log_sum - head.logits_of(logits, column, here)
        chosen = head.greedy(logits) if self.agreement else None
        divergence, agrees = torch.zeros_like(cross_entropy), None
        kept, gradient = 1 - self.cross_entropy_share, _Gradient()
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

    def _view(self, target: Target, rows: slice, model: "_Columns") -> "_All | _Top":
        """Return what a target says of the tokens of a chunk, in the columns of this rank."""
        head = model.head
        if isinstance(target, TopTokens):
            return _Top.stored(target, rows, model)
        target.require_alike(head)
        theirs = _Columns.of(target.logits(rows), target.head, model.scale)
        if self.top_k is None or self.top_k >= head.vocab_size:
            return _All(theirs)
        return _Top.of(theirs, self.top_k)


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
        model = _Columns.of(logits, head, 1.0)
        view = _All(_Columns.of(self.reference.logits(rows), self.reference.head, 1.0))
        same = view.greedy == head.greedy(logits)
        values = view.compare(model, 0.0).value
        return torch.stack([values, same.to(values.dtype)], dim=-1)


_LEAST_REST = 1e-7  # of what stored tokens leave to others: less is the rounding of their sum


@dataclass
class _Gradient:
    """Of a chunk's logits, before the weights of its tokens: a multiple of q and what is beside it.

    Attributes:
        factors: that q is multiplied by, [N].
        beside: what is added in every column of this rank, [N, width]; None: nothing.
        columns: some columns of each row, and what is added there, each [N, K].
        others: what is added in the columns that some targets do not tell apart.
    """

    factors: Tensor | float = 0.0
    beside: Tensor | None = None
    columns: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    others: list["_Others"] = field(default_factory=list)

    def add(self, other: "_Gradient", factor: float) -> None:
        """Add the multiple of another, whose tensors are used up."""
        self.factors = self.factors + factor * other.factors
        if other.beside is not None:
            scaled = other.beside if factor == 1 else other.beside.mul_(factor)
            self.beside = scaled if self.beside is None else self.beside.add_(scaled)
        self.columns += [(column, factor * values) for column, values in other.columns]
        self.others += [replace(one, factor=factor * one.factor) for one in other.others]

    def into(self, model: "_Columns", plain: "_Columns", share: float, weights: Tensor) -> Tensor:
        """Write the gradient over the logits of the model.

        Args:
            model: q at the temperature of the divergence.
            plain: q at that of the cross-entropy.
            share: of the cross-entropy in the loss.
            weights: of each token, [N].
        """
        logits, width = model.logits, model.head.width
        factors = self.factors + share if plain is model else self.factors
        for block in model.blocks():
            log_q = model.log_probs(block)
            out = log_q.exp()
            out *= _of(factors, block)
            for one in self.others:
                out += one.part(log_q, block)
            if share and plain is not model:
                out += plain.log_probs(block).exp_().mul_(share)
            if self.beside is not None:
                out += self.beside[block]
            if width < logits.shape[1]:
                out = functional.pad(out, (0, logits.shape[1] - width))
            for column, values in self.columns:
                out.scatter_add_(-1, column[block], values[block])
            logits[block] = out.mul_(weights[block, None])
        return logits


@dataclass(frozen=True)
class _Others:
    """The gradient of the entry for all tokens but K, shared out among them.

    Attributes:
        column: of the K tokens, [N, K].
        here: which of them are columns of this rank, [N, K].
        shift: d of the entry, [N].
        reverse_share: of the divergence.
        factor: of the whole.
    """

    column: Tensor
    here: Tensor
    shift: Tensor
    reverse_share: float
    factor: float = 1.0

    def part(self, log_q: Tensor, block: slice) -> Tensor:
        """Return it for a block, [n, width].

        A token has q(v) / q(rest) of it: of KL(p || q) that is -p(rest) * q(v) / q(rest), a
        quotient that is never large, though p(rest) / q(rest) may be; of KL(q || p) q(v) * d.
        """
        shift, r = self.shift[block, None], self.reverse_share
        found = (log_q - shift).exp_().mul_(-(1 - r))
        if r:
            found += log_q.exp().mul_(r * shift)
        apart = _marked(self.column[block], self.here[block], found)
        return found.masked_fill_(apart, 0.0).mul_(self.factor)


def _marked(column: Tensor, here: Tensor, like: Tensor) -> Tensor:
    """Return which columns are among some, [n, width]; those that are not here have any number."""
    width = like.shape[1]
    marks = torch.zeros(len(like), width + 1, dtype=torch.bool, device=like.device)
    return marks.scatter_(-1, column.where(here, width), True)[:, :width]


def _of(factors: Tensor | float, block: slice) -> Tensor | float:
    return factors[block, None] if isinstance(factors, Tensor) else factors


@dataclass(frozen=True)
class _Columns:
    """A distribution of every token of a chunk, by this rank's columns of the vocabulary.

    Attributes:
        logits: [N, V/tp].
        head: whose rows the columns are.
        scale: what logits are multiplied by: one over the temperature.
        log_sum: log of the sum of exp(scaled logit) over the whole vocabulary, [N].
    """

    logits: Tensor
    head: HeadPart
    scale: float
    log_sum: Tensor

    @staticmethod
    def of(logits: Tensor, head: HeadPart, scale: float) -> "_Columns":
        """Sum up over the vocabulary."""
        whole = _Columns(logits, head, scale, logits.new_zeros(len(logits), dtype=_kind(logits)))
        sums = [_log_sum_exp(whole.scaled(block)) for block in whole.blocks()]
        return _Columns(logits, head, scale, head.log_summed(torch.cat(sums)))

    @property
    def kind(self) -> torch.dtype:
        return self.log_sum.dtype

    def blocks(self) -> Iterator[slice]:
        """Cut the tokens into blocks."""
        elements = _GPU_BLOCK_ELEMENTS if self.logits.is_cuda else _BLOCK_ELEMENTS
        size = max(elements // self.logits.shape[1], 1)
        return (slice(start, start + size) for start in range(0, len(self.logits), size))

    def scaled(self, block: slice) -> Tensor:
        """Return the logits of a block over the temperature, [n, width]."""
        columns = self.logits[block, : self.head.width].to(self.kind)
        return columns if self.scale == 1 else columns * self.scale

    def log_probs(self, block: slice) -> Tensor:
        """Return the log-probabilities of a block, newly made, [n, width]."""
        return self.scaled(block) - self.log_sum[block, None]

    def log_probs_of(self, tokens: Tensor) -> Tensor:
        """Return those of some tokens, whichever ranks have them, [N, K] -> [N, K]."""
        column, here = self.columns_of(tokens)
        picked = self.logits.gather(-1, column).to(self.kind) * here
        return self.head.summed(picked) * self.scale - self.log_sum[:, None]

    def rest(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of all other tokens together, [N]: a sum over these."""
        column, here = self.columns_of(tokens)
        sums = []
        for block in self.blocks():
            others = self.log_probs(block)
            apart = _marked(column[block], here[block], others)
            sums.append(others.masked_fill_(apart, -math.inf).logsumexp(-1))  # maybe of none
        return self.head.log_summed(torch.cat(sums))

    def columns_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return columns of tokens here, [N, K], and of which of them there are any, [N, K]."""
        column, here = self.head.columns_of(tokens.flatten())
        return column.view(tokens.shape), here.view(tokens.shape)


def _kind(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Found:
    """Divergence of each token, [N], and its gradient by the scaled logits."""

    value: Tensor
    gradient: _Gradient


@dataclass(frozen=True)
class _All:
    """A target of which every token is told apart."""

    theirs: _Columns

    @property
    def greedy(self) -> Tensor:
        return self.theirs.head.greedy(self.theirs.logits)

    def compare(self, model: _Columns, reverse_share: float) -> _Found:
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
            sums[0, block] = _toward(p, d, log_q).sum(-1)
            part = p.mul_(r - 1) if r < 1 else torch.zeros_like(p)
            if r:
                sums[1, block] = _toward(log_q.exp(), -d, log_q - d).sum(-1)
                part += log_q.exp_().mul_(d).mul_(r)
            beside[block] = part
        forward, backward = model.head.summed(sums)
        factors = (1 - r) - r * backward
        return _Found((1 - r) * forward + r * backward, _Gradient(factors, beside))


@dataclass(frozen=True)
class _Top:
    """A target of which some tokens are told apart.

    Attributes:
        tokens: in the whole vocabulary, [N, K].
        log_probs: theirs, [N, K].
        rest: the log-probability of all others, [N]; None where there are no others.
    """

    tokens: Tensor
    log_probs: Tensor
    rest: Tensor | None

    @staticmethod
    def stored(target: TopTokens, rows: slice, model: _Columns) -> "_Top":
        """Read what was stored of a chunk; rounded logits may have more than all probability."""
        logits, log_sum = (one[rows].to(model.kind) for one in (target.logits, target.log_sum))
        log_probs, tokens = logits - log_sum[:, None], target.tokens[rows].long()
        total = log_probs.logsumexp(-1, keepdim=True)
        if tokens.shape[1] == model.head.vocab_size:
            return _Top(tokens, log_probs - total, None)
        log_probs -= total.clamp(min=0)
        left = -torch.expm1(total.squeeze(-1)).clamp(max=-_LEAST_REST)
        return _Top(tokens, log_probs, left.log())

    @staticmethod
    def of(theirs: _Columns, number: int) -> "_Top":
        """Tell the most likely tokens of a distribution apart, over all ranks."""
        values, tokens = theirs.head.most_likely(theirs.logits, number)
        log_probs = values.to(theirs.kind) * theirs.scale - theirs.log_sum[:, None]
        return _Top(tokens, log_probs, theirs.rest(tokens))

    @property
    def greedy(self) -> Tensor:
        equals = self.log_probs == self.log_probs.amax(-1, keepdim=True)
        return self.tokens.where(equals, torch.iinfo(self.tokens.dtype).max).amin(-1)

    def compare(self, model: _Columns, reverse_share: float) -> _Found:
        """Compare the model with it, entry by entry; every rank does so."""
        r = reverse_share
        log_p, log_q = self.log_probs, model.log_probs_of(self.tokens)
        if self.rest is not None:
            log_p = torch.cat([log_p, self.rest[:, None]], dim=-1)
            log_q = torch.cat([log_q, model.rest(self.tokens)[:, None]], dim=-1)
        d, p, q = log_q - log_p, log_p.exp(), log_q.exp()
        forward = _toward(p, d, log_q).sum(-1)
        backward = _toward(q, -d, log_p).sum(-1)
        column, here = model.columns_of(self.tokens)
        of_tokens = (r * q * d - (1 - r) * p)[:, : column.shape[1]] * here
        gradient = _Gradient((1 - r) - r * backward, columns=[(column, of_tokens)])
        if self.rest is not None:
            gradient.others.append(_Others(column, here, d[:, -1], r))
        return _Found((1 - r) * forward + r * backward, gradient)


def _toward(p: Tensor, d: Tensor, log_q: Tensor) -> Tensor:
    """Return q - p - p * d, not below zero, with q = p * exp(d); same shape.

    Where p is 0 in float32 and q is not, d is large, and the first form has no exp(d). A CPU takes
    it for all elements of a block or for none: choosing among elements is its slowest operation.
    """
    if d.device.type == "cpu" and d.numel() and d.amax() <= _LARGE:
        return torch.expm1(d).sub_(d).mul_(p)
    near = d <= _LARGE
    close = torch.expm1(d.where(near, 0.0)) - d
    return p * close.where(near, -1 - d) + log_q.exp().where(~near, 0.0)


def _log_sum_exp(values: Tensor) -> Tensor:
    """Return log(sum(exp(value))) of each row, [n, V] -> [n]; -inf of no values."""
    if not values.shape[1]:
        return values.new_full((len(values),), -math.inf)
    top = values.amax(-1, keepdim=True)
    return (values - top).exp_().sum(-1).log_() + top.squeeze(-1)
