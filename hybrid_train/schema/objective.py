"""What is minimised.

An objective of a user's own is a dataclass like those below, in a package of theirs.
"""

from dataclasses import dataclass
from typing import ClassVar

from hybrid_train.schema.extension import Extension
from hybrid_train.schema.limits import Factor
from hybrid_train.schema.model import Model

MAIN = "model"  # the network of a step that trains no other


@dataclass(kw_only=True)
class ObjectiveSettings(Extension):
    """What the settings of every objective have: routers add their balance loss to any loss.

    The implementation is called with the settings and a `Given` (`training/objective.py`).
    """

    moe_aux_loss_scale: Factor = 1e-4  # weight of the sequence-wise balance loss of the experts

    def models(self, model: Model) -> dict[str, Model]:
        """Return the models that are trained, by the names of their networks.

        Args:
            model: the section of the run.
        """
        return {MAIN: model}


@dataclass(kw_only=True)
class NextToken(ObjectiveSettings):
    """Cross-entropy of the next token, plus the weighted MTP and load-balance terms."""

    implementation: ClassVar[str] = "hybrid_train.training.next_token:NextToken"
    kind: str = "next_token"
    mtp_loss_scale: Factor = 0.1  # weight of the mean of the MTP losses


OBJECTIVES: dict[str, type[ObjectiveSettings]] = {"next_token": NextToken}
