"""Settings of an edit, a hook and a row transform."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from hybrid_train.schema.extension import (
    EditSettings,
    HookSettings,
    RowTransformSettings,
)
from hybrid_train.schema.limits import Share
from hybrid_train.schema.problems import Problem


@dataclass(kw_only=True)
class Freeze(EditSettings):
    """Parameters that are not trained."""

    implementation: ClassVar[str] = "my_package.work:FreezeParameters"
    names: list[str] = field(default_factory=list)  # globs, such as "embedding.*"

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the settings."""
        if not self.names:
            yield Problem("names", "[]", "must name parameters", '["embedding.*"]')


@dataclass(kw_only=True)
class LossAverage(HookSettings):
    """The loss, averaged over steps."""

    implementation: ClassVar[str] = "my_package.work:AverageLoss"
    decay: Share = 0.9  # share of the average that a step leaves


@dataclass(kw_only=True)
class SkipStart(RowTransformSettings):
    """The first labels of each row, where a token has seen little, do not count."""

    implementation: ClassVar[str] = "my_package.work:SkipFirstLabels"
    share: Share = 0.25  # of the row
