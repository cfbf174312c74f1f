"""What is minimised."""

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.config.problems import Problem, at_least


@dataclass(kw_only=True)
class NextToken:
    """Cross-entropy of the next token, plus the weighted MTP and load-balance terms."""

    kind: str = "next_token"
    mtp_loss_scale: float = 0.1  # weight of the mean of the MTP losses
    moe_aux_loss_scale: float = 1e-4  # weight of the sequence-wise balance loss of the experts

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(
            0, mtp_loss_scale=self.mtp_loss_scale, moe_aux_loss_scale=self.moe_aux_loss_scale
        )
