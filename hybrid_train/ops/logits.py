"""The core of every loss on logits: chunks of tokens, a split vocabulary; and cross-entropy.

A loss is a `Term`: it is told the logits of one chunk and answers with a value for each token and
with the gradient of these logits; it may add values that are only looked at. `weighted_sum` does
the rest by hand: the chunks, their GEMMs with the head, and the gradients of these. No collective
is differentiated, and no logits of all tokens exist. What is only looked at is a `Reading`: several
values of each token, no gradient, and of the tokens that are asked for alone (`read`).

Dimensions: T tokens, N tokens of a chunk, H hidden, V rows of the head, V/tp those of one rank.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from hybrid_train.ops.linear import add_gemm, gemm

# Elements of the logits of a chunk, 128 MB in float32: little beside the model that has such a
# vocabulary, and one chunk where T x V/tp is small, as 8,192 tokens over a vocabulary of 4,096.
CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class HeadPart:
    """This rank's rows of a head, which maps hidden states to logits.

    Attributes:
        weight: [V/tp, H]; equal parts in rank order.
        vocab_size: tokens of the vocabulary; rows of the whole head from there on are padding,
            which has no probability and gets no gradient.
        group: the tensor-parallel group; None where one process holds the whole head.
        sequence_split: each rank has a part of the hidden states, in rank order, not all of them.
        gradient_buffer: where the gradient of the weight is added while it is computed, [V/tp, H];
            its ordinary gradient is then zero. None: an ordinary gradient.
    """

    weight: Tensor
    vocab_size: int
    group: dist.ProcessGroup | None = None
    sequence_split: bool = False
    gradient_buffer: Tensor | None = None

    @property
    def first(self) -> int:
        """The token of this rank's first row."""
        return 0 if self.group is None else dist.get_rank(self.group) * len(self.weight)

    @property
    def width(self) -> int:
        """How many of this rank's rows are tokens; 0 where it holds nothing but padding."""
        return min(max(self.vocab_size - self.first, 0), len(self.weight))

    def summed(self, values: Tensor) -> Tensor:
        """Add up what every rank found in its columns, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def softmax(self, logits: Tensor) -> "Softmax":
        """Return the probabilities of this rank's columns; logits [N, V/tp]."""
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        columns = logits[:, : self.width]
        probs = torch.softmax(columns, dim=-1, dtype=kind)
        if self.width:
            # Read off where the probability is largest, at least 1/V, so no digits are lost.
            log_sum = columns.amax(-1).to(kind) - probs.amax(-1).log()
        else:
            log_sum = probs.new_full((len(logits),), -math.inf)
        if self.group is None:
            return Softmax(probs, None, log_sum)
        total = self.log_summed(log_sum)
        return Softmax(probs, torch.exp(log_sum - total), total)

    def log_summed(self, values: Tensor) -> Tensor:
        """Return log(sum(exp(value))) over the ranks, of what each found in its columns."""
        if self.group is None:
            return values
        top = values.clone()  # sums stay in the log domain's safe range
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        return top + torch.log(self.summed(torch.exp(values - top)))

    def columns_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of tokens [N] here, [N, 1], and of which of them there are any, [N].

        A token of another rank is given some column, so that it can be gathered.
        """
        local = tokens - self.first
        mine = (local >= 0) & (local < self.width)
        return local.clamp(0, len(self.weight) - 1)[:, None], mine

    def logits_of(self, logits: Tensor, column: Tensor, mine: Tensor) -> Tensor:
        """Return the logit of one token each, whichever rank has its column, [N].

        Args:
            logits: of this rank, [N, V/tp].
            column: as `columns_of` returns it, [N, 1].
            mine: likewise, [N].
        """
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return self.summed(logits.gather(-1, column).squeeze(-1).to(kind) * mine)

    def greedy(self, logits: Tensor) -> Tensor:
        """Return the most likely token of each row, the first of equals: [N, V/tp] -> [N]."""
        if self.width:
            top, token = logits[:, : self.width].max(dim=-1)
            token = token + self.first
        else:
            top, token = logits.new_full((2, len(logits)), -math.inf)
            token = token.long()
        if self.group is None:
            return token
        highest = top.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        token = token.masked_fill(top < highest, self.vocab_size)
        dist.all_reduce(token, op=dist.ReduceOp.MIN, group=self.group)
        return token

    def most_likely(self, logits: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return logits and tokens of the most likely ones: [N, V/tp] -> each [N, K]."""
        columns = logits[:, : self.width]
        values, tokens = columns.topk(min(number, self.width), dim=-1)
        tokens = tokens + self.first
        if self.group is None:
            return values, tokens
        values, places = self._candidates(values, number).topk(number, dim=-1)
        return values, self._candidates(tokens, number).gather(-1, places)

    def _candidates(self, values: Tensor, number: int) -> Tensor:
        """Bring the candidates of all ranks together, [N, K of this rank] -> [N, K * ranks].

        A rank with fewer tokens than are wanted fills up with what is never chosen.
        """
        fill = -math.inf if values.is_floating_point() else 0
        own = values.new_full((len(values), number), fill)
        own[:, : values.shape[1]] = values
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts, dim=-1)

    def gathered(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of all tokens, [T, H]."""
        if self.group is None or not self.sequence_split:
            return hidden.reshape(-1, hidden.shape[-1])
        length = len(hidden) * dist.get_world_size(self.group)
        whole = hidden.new_empty(length, *hidden.shape[1:])
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.group)
        return whole.reshape(-1, hidden.shape[-1])

    def _reduced(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """Add up the gradients [T, H] that each rank's columns give, in the shape of its part."""
        if self.group is None or not self.sequence_split:
            return self.summed(grad).view(shape)
        own = grad.new_empty(shape)
        dist.reduce_scatter_tensor(own.view(-1, shape[-1]), grad, group=self.group)
        return own


@dataclass(frozen=True)
class Softmax:
    """The distribution of every token of a chunk over the whole vocabulary.

    Attributes:
        probs: over this rank's columns that are tokens, normalised among them, [N, width], float32.
        share: of these columns in the whole probability, [N]; None: they are the whole vocabulary.
        log_sum: log of the sum of exp(logit) over the whole vocabulary, [N].
    """

    probs: Tensor
    share: Tensor | None
    log_sum: Tensor

    def scaled(self, factors: Tensor) -> Tensor:
        """Return factors [N] that bring `probs` to the whole vocabulary."""
        return factors if self.share is None else factors * self.share


# Weights of the values, [N] -> gradient of their weighted sum by the logits, [N, V/tp].
Pullback = Callable[[Tensor], Tensor]
# (logits [N, V/tp], which tokens of [T] these are, head) -> values [N] or [N, K], pullback. Of K
# values the first is the loss, the others are looked at. The logits are the term's to overwrite. A
# term that needs several tensors of their size at once says so: `tensors`.
Term = Callable[[Tensor, slice, HeadPart], tuple[Tensor, Pullback]]


def weighted_sum(
    hidden: Tensor, head: HeadPart, term: Term, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum over tokens of weight times value of a term, and the values.

    The weights are known before the pass, so a chunk of logits is used up as soon as it is made:
    its gradients are computed in the forward pass, but for the last chunk, which waits for the
    backward pass. One chunk is thus computed as if there were no chunks, and needs no buffers.
    Where a weight depends on the values (as that of a preference over whole sequences does),
    compute these without gradients first.

    Args:
        hidden: [..., H], T tokens in all; with `sequence_split` this rank's T / tp.
        head: this rank's part of the head.
        term: what is computed of the logits.
        weights: of each token, [T] in any shape.

    Returns:
        The sum, with gradients for hidden states and head; the values, [T] or [T, K], without.
    """
    learns = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    total, values = _WeightedSum.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head, term, weights.reshape(-1), learns
    )
    return total, values


@dataclass(frozen=True)
class CrossEntropy:
    """The negative log-probability of each label, in nats.

    Attributes:
        labels: token ids in the whole vocabulary, [T].
    """

    labels: Tensor

    def __call__(self, logits: Tensor, rows: slice, head: HeadPart) -> tuple[Tensor, Pullback]:
        """Return the values of a chunk, [N] in float32 (float64 if the logits are), see `Term`."""
        found = head.softmax(logits)
        local, mine = head.columns_of(self.labels[rows])
        picked = head.logits_of(logits, local, mine)

        def pullback(weights: Tensor) -> Tensor:
            width, rest = found.probs.shape[-1], logits.shape[-1] - found.probs.shape[-1]
            factors = found.scaled(weights)[:, None]
            if rest:
                out = found.probs.new_zeros(logits.shape)
                torch.mul(found.probs, factors, out=out[:, :width])
            else:
                out = found.probs.mul_(factors)
            out.scatter_add_(-1, local, -(weights * mine)[:, None])
            return out.to(logits.dtype)

        return found.log_sum - picked, pullback


class Reading(Protocol):
    """What is computed of the logits of a chunk where no gradient is asked for."""

    @property
    def num_values(self) -> int:
        """How many values a token has, K."""
        ...

    def __call__(self, logits: Tensor, rows: slice, head: HeadPart) -> Tensor:
        """Return the values of a chunk, [N, K], float32; arguments as of a `Term`."""
        ...


@dataclass(frozen=True)
class LabelScores:
    """What a distribution says of its label: log-probability, nats; 1 if it is the greedy token.

    Attributes:
        labels: token ids in the whole vocabulary, [T].
        with_entropy: a third value, the entropy of the distribution, nats.
    """

    labels: Tensor
    with_entropy: bool = False

    @property
    def num_values(self) -> int:
        return 2 + self.with_entropy

    def __call__(self, logits: Tensor, rows: slice, head: HeadPart) -> Tensor:
        labels, found = self.labels[rows], head.softmax(logits)
        log_probs = head.logits_of(logits, *head.columns_of(labels)) - found.log_sum
        values = [log_probs, (head.greedy(logits) == labels).to(log_probs.dtype)]
        if self.with_entropy:
            columns = logits[:, : head.width].to(found.probs.dtype)
            mean = found.scaled((found.probs * columns).sum(dim=-1))  # of this rank's logits
            values.append(found.log_sum - head.summed(mean))
        return torch.stack(values, dim=-1)


@dataclass(frozen=True)
class MostLikely:
    """The most likely tokens: their numbers, their logits, the log of the sum of all exp(logit).

    Its values are float64, which holds any token.

    Attributes:
        number: how many, K, at most the vocabulary.
    """

    number: int

    @property
    def num_values(self) -> int:
        return 2 * self.number + 1

    def __call__(self, logits: Tensor, rows: slice, head: HeadPart) -> Tensor:
        values, tokens = head.most_likely(logits, self.number)
        log_sum = head.softmax(logits).log_sum[:, None]
        return torch.cat([tokens.double(), values.double(), log_sum.double()], dim=-1)


@torch.no_grad()
def read(hidden: Tensor, head: HeadPart, reading: Reading, places: Tensor) -> Tensor:
    """Return what a reading makes of the logits of some tokens; the others have none.

    Args:
        hidden: [..., H], T tokens in all; with `sequence_split` this rank's T / tp.
        head: this rank's part of the head.
        reading: of the n tokens at these places.
        places: numbers of tokens in the whole `hidden`, equal on all tensor ranks, [n].

    Returns:
        [n, K], the same on all tensor ranks.
    """
    rows, weight = head.gathered(hidden)[places], head.weight
    if not len(rows):
        return rows.new_empty(0, reading.num_values, dtype=torch.float32)
    return torch.cat([
        reading(gemm(rows[chunk], weight), chunk, head)
        for chunk in chunks(len(rows), rows.shape[1], len(weight))
    ])  # fmt: skip


def chunks(tokens: int, width: int, columns: int, tensors: int = 1) -> Iterator[slice]:
    """Cut tokens into chunks whose logits are small.

    A chunk has at least as many tokens as there are hidden units: the gradient of the head, which
    every chunk adds to, is as large as the logits of so many. Where several tensors of this size
    are needed, so much is computed of each that adding up counts for less.
    """
    size = max(CHUNK_ELEMENTS // (columns * tensors), width // tensors**2)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: HeadPart,
        term: Term,
        weights: Tensor,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = head.gathered(hidden)
        values, of_rows, of_weight = [], None, None
        tensors = getattr(term, "tensors", 1)
        for chunk in chunks(len(rows), rows.shape[1], len(weight), tensors):
            value, pullback = term(gemm(rows[chunk], weight), chunk, head)
            values.append(value)
            of_logits = pullback(weights[chunk]) if learns else None
            del pullback  # and the logits that it holds
            if of_logits is None:
                continue
            if chunk.stop == len(rows):  # waits for the backward pass
                own = rows if len(values) == 1 else rows[chunk].clone()
                ctx.save_for_backward(of_logits, own, weight, of_rows)
                ctx.head, ctx.shape, ctx.chunk = head, hidden.shape, chunk
                ctx.of_weight = of_weight
                continue
            if ctx.needs_input_grad[0]:
                of_rows = torch.empty_like(rows) if of_rows is None else of_rows
                of_rows[chunk] = gemm(of_logits, weight.t())
            if ctx.needs_input_grad[1]:
                of_weight = _empty_sum(weight) if of_weight is None else of_weight
                add_gemm(of_weight, of_logits, rows[chunk])
            del of_logits  # before the next chunk has some
        found = torch.cat(values)
        ctx.mark_non_differentiable(found)
        losses = found if found.dim() == 1 else found[:, 0]
        return (losses * weights).sum(), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_logits, rows, weight, of_rows = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            whole = gemm(of_logits, weight.t())
            if of_rows is not None:
                of_rows[ctx.chunk] = whole
                whole = of_rows
            grad_hidden = ctx.head._reduced(whole * grad, ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _of_weight(ctx, of_logits, rows * grad, grad)
        return grad_hidden, grad_weight, None, None, None, None


def _of_weight(ctx: Any, of_logits: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the head, of the last chunk and of those before it."""
    buffer, weight, before = ctx.head.gradient_buffer, ctx.head.weight, ctx.of_weight
    assert before is not None or not ctx.chunk.start, "a loss has one backward pass"
    if buffer is None and before is None:
        return of_logits.t() @ rows
    total = _empty_sum(weight) if buffer is None else buffer
    if before is not None:
        total.addcmul_(before, grad)
        before = ctx.of_weight = None  # before there is another tensor of this size
    add_gemm(total, of_logits, rows)
    return total.to(weight.dtype) if buffer is None else torch.zeros_like(weight)


def _empty_sum(weight: Tensor) -> Tensor:
    """Return zeros to add gradients of a weight to, at least in float32."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
