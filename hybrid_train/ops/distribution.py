"""A distribution of every token by columns of the vocabulary, and gradients of its logits.

Every rank has some columns. What a token needs of all of them are sums, by plain all-reduces; the
gradient of a column needs nothing but its own probabilities and these sums. Columns are computed a
block of tokens at a time.

Dimensions: N tokens of a chunk, n tokens of a block, V/tp rows of a head on one rank, K tokens that
are told apart.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_train.ops.logits import HeadPart

_LARGE = 60.0  # of d: with more, p is nearly 0 in float32; exp() of it is finite
# Elements of a block, which is computed at once: 4 MB in float32, so that what it computes stays in
# a cache, and adds little to the logits of a chunk.
_BLOCK_ELEMENTS = 2**20
# On a GPU every operation of a block is a launch of a kernel: about 5 us, in which 2**20 elements
# are long done. 64 MB in float32; calculated, it has not run on a GPU.
_GPU_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Columns:
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
    def of(logits: Tensor, head: HeadPart, scale: float) -> "Columns":
        """Sum up over the vocabulary."""
        whole = Columns(logits, head, scale, logits.new_zeros(len(logits), dtype=_kind(logits)))
        sums = [_log_sum_exp(whole.scaled(block)) for block in whole.blocks()]
        return Columns(logits, head, scale, head.log_summed(torch.cat(sums)))

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


@dataclass
class Gradient:
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
    others: list["Others"] = field(default_factory=list)

    def add(self, other: "Gradient", factor: float) -> None:
        """Add the multiple of another, whose tensors are used up."""
        self.factors = self.factors + factor * other.factors
        if other.beside is not None:
            scaled = other.beside if factor == 1 else other.beside.mul_(factor)
            self.beside = scaled if self.beside is None else self.beside.add_(scaled)
        self.columns += [(column, factor * values) for column, values in other.columns]
        self.others += [replace(one, factor=factor * one.factor) for one in other.others]

    def into(self, model: "Columns", plain: "Columns", share: float, weights: Tensor) -> Tensor:
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
class Others:
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
class Found:
    """Divergence of each token, [N], and its gradient by the scaled logits."""

    value: Tensor
    gradient: Gradient


def toward(p: Tensor, d: Tensor, log_q: Tensor) -> Tensor:
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
