"""Reactions to the events of the loop.

    fit_start(run)
    while tokens are left and nobody asked to stop:
        step_start(run)
        ... one step ...
        step_end(run, report)
    fit_end(run)

When an exception ends any of this, `fit_failed(run)` is called. Hooks are called in the order of
the list; at `step_end` the step is already counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid_train.training.loop import Run
    from hybrid_train.training.report import StepReport


class Hook:
    """Does nothing; a hook overrides the events it cares about."""

    def fit_start(self, run: Run) -> None: ...

    def step_start(self, run: Run) -> None: ...

    def step_end(self, run: Run, report: StepReport) -> None: ...

    def fit_end(self, run: Run) -> None: ...

    def fit_failed(self, run: Run) -> None:
        """Give back what the hook holds, such as the terminal; must not raise."""


@dataclass
class HookList(Hook):
    """Hooks that are called one after the other."""

    hooks: list[Hook] = field(default_factory=list)

    def fit_start(self, run: Run) -> None:
        for hook in self.hooks:
            hook.fit_start(run)

    def step_start(self, run: Run) -> None:
        for hook in self.hooks:
            hook.step_start(run)

    def step_end(self, run: Run, report: StepReport) -> None:
        for hook in self.hooks:
            hook.step_end(run, report)

    def fit_end(self, run: Run) -> None:
        for hook in self.hooks:
            hook.fit_end(run)

    def fit_failed(self, run: Run) -> None:
        for hook in self.hooks:
            hook.fit_failed(run)
