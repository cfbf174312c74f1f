"""Cross-entropy with one label for each token, as a term of `ops.logits`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.ops.logits import HeadPart, Pullback


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
        local = self.labels[rows] - head.first
        mine = (local >= 0) & (local < head.width)
        local = local.clamp(0, logits.shape[-1] - 1)[:, None]
        picked = head.summed(logits.gather(-1, local).squeeze(-1).to(found.probs.dtype) * mine)

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
