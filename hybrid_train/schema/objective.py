"""What is minimised."""

from dataclasses import dataclass
from typing import ClassVar

from hybrid_train.schema.extension import Extension
from hybrid_train.schema.limits import Factor


@dataclass(kw_only=True)
class Objective(Extension):
    """What every objective has: routers add their balance loss, whatever else is minimised."""

    moe_aux_loss_scale: Factor = 1e-4  # weight of the sequence-wise balance loss of the experts


@dataclass(kw_only=True)
class NextToken(Objective):
    """Cross-entropy of the next token, plus the weighted MTP and load-balance terms."""

    implementation: ClassVar[str] = "hybrid_train.training.next_token:NextToken"
    kind: str = "next_token"
    mtp_loss_scale: Factor = 0.1  # weight of the mean of the MTP losses


OBJECTIVES: dict[str, type[Objective]] = {"next_token": NextToken}
