"""Compares logits position by position: ours by Megatron, theirs by transformers.

Imports Megatron, so the process must have been started before (`runtime/start.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.megatron.hybrid import Hybrid


@dataclass(frozen=True)
class LogitDifference:
    """How far two sets of logits are apart, as a share of the logits' own spread."""

    scale: float  # standard deviation of their logits
    largest: float  # absolute
    mean: float  # absolute
    first: int | None  # position of the first that differs by more than the tolerance
    length: int

    @property
    def share(self) -> float:
        """The largest difference as a share of the scale."""
        return self.largest / self.scale if self.scale else self.largest

    def __str__(self) -> str:
        where = "none" if self.first is None else f"the first at position {self.first}"
        return (
            f"logits of {self.length} positions: largest difference {self.largest:.3g}, mean "
            f"{self.mean:.3g}, of logits with a standard deviation of {self.scale:.3g} (largest / "
            f"scale = {self.share:.1e}); beyond the tolerance: {where}"
        )


def compare_logits(ours: Tensor, theirs: Tensor, tolerance: float) -> LogitDifference:
    """Compare logits [B, S, V]; `tolerance` is a share of the standard deviation of theirs."""
    apart = (ours.double() - theirs.double()).abs()
    apart = apart.nan_to_num(torch.inf, torch.inf)
    scale = theirs.double().std().item()
    beyond = (apart > tolerance * scale).flatten(2).any(dim=2).any(dim=0).nonzero()
    return LogitDifference(
        scale=scale,
        largest=apart.max().item(),
        mean=apart.mean().item(),
        first=int(beyond[0].item()) if len(beyond) else None,
        length=ours.shape[1],
    )


@torch.no_grad()
def our_logits(model: Hybrid, tokens: Tensor, vocab_size: int) -> Tensor:
    """Return our logits of tokens [B, S] without the padding of the vocabulary: [B, S, V]."""
    outputs = model(tokens.to(torch.cuda.current_device()))
    return outputs.logits()[..., :vocab_size].float()
