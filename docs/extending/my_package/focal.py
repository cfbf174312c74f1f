"""Settings of the focal loss. A login node reads them: no torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hybrid_train.schema.limits import Factor
from hybrid_train.schema.objective import ObjectiveSettings
from hybrid_train.schema.problems import Problem


@dataclass(kw_only=True)
class Focal(ObjectiveSettings):
    """Cross-entropy that counts tokens less that the model predicts well."""

    implementation: ClassVar[str] = "my_package.focal_loss:FocalLoss"
    gamma: Factor = 2.0  # 0: cross-entropy

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the settings."""
        if 0 < self.gamma < 1:
            rule = "must be 0 or at least 1: between, gradients of certain tokens are unbounded"
            yield Problem("gamma", self.gamma, rule, 1.0)
