"""What is minimised."""

from dataclasses import dataclass

from hybrid_train.schema.limits import Factor


@dataclass(kw_only=True)
class NextToken:
    """Cross-entropy of the next token, plus the weighted MTP and load-balance terms."""

    kind: str = "next_token"
    mtp_loss_scale: Factor = 0.1  # weight of the mean of the MTP losses
    moe_aux_loss_scale: Factor = 1e-4  # weight of the sequence-wise balance loss of the experts
