"""A target of which some tokens are told apart, and all others are one entry.

Dimensions: T tokens, N tokens of a chunk, K tokens that are told apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.ops.distribution import Columns, Found, Gradient, Others, toward
from hybrid_train.ops.reference import TopTokens

_LEAST_REST = 1e-7  # of what stored tokens leave to others: less is the rounding of their sum


@dataclass(frozen=True)
class TopEntries:
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
    def stored(target: TopTokens, rows: slice, model: Columns) -> "TopEntries":
        """Read what was stored of a chunk; rounded logits may have more than all probability."""
        logits, log_sum = (one[rows].to(model.kind) for one in (target.logits, target.log_sum))
        log_probs, tokens = logits - log_sum[:, None], target.tokens[rows].long()
        total = log_probs.logsumexp(-1, keepdim=True)
        if tokens.shape[1] == model.head.vocab_size:
            return TopEntries(tokens, log_probs - total, None)
        log_probs -= total.clamp(min=0)
        left = -torch.expm1(total.squeeze(-1)).clamp(max=-_LEAST_REST)
        return TopEntries(tokens, log_probs, left.log())

    @staticmethod
    def of(theirs: Columns, number: int) -> "TopEntries":
        """Tell the most likely tokens of a distribution apart, over all ranks."""
        values, tokens = theirs.head.most_likely(theirs.logits, number)
        log_probs = values.to(theirs.kind) * theirs.scale - theirs.log_sum[:, None]
        return TopEntries(tokens, log_probs, theirs.rest(tokens))

    @property
    def greedy(self) -> Tensor:
        """The most likely token of each row, the first of equals, [N]."""
        equals = self.log_probs == self.log_probs.amax(-1, keepdim=True)
        return self.tokens.where(equals, torch.iinfo(self.tokens.dtype).max).amin(-1)

    def compare(self, model: Columns, reverse_share: float) -> Found:
        """Compare the model with it, entry by entry; every rank does so."""
        r = reverse_share
        log_p, log_q = self.log_probs, model.log_probs_of(self.tokens)
        if self.rest is not None:
            log_p = torch.cat([log_p, self.rest[:, None]], dim=-1)
            log_q = torch.cat([log_q, model.rest(self.tokens)[:, None]], dim=-1)
        d, p, q = log_q - log_p, log_p.exp(), log_q.exp()
        forward = toward(p, d, log_q).sum(-1)
        backward = toward(q, -d, log_p).sum(-1)
        column, here = model.columns_of(self.tokens)
        of_tokens = (r * q * d - (1 - r) * p)[:, : column.shape[1]] * here
        gradient = Gradient((1 - r) - r * backward, columns=[(column, of_tokens)])
        if self.rest is not None:
            gradient.others.append(Others(column, here, d[:, -1], r))
        return Found((1 - r) * forward + r * backward, gradient)
