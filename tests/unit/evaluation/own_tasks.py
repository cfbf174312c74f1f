"""Settings of the tasks that need no library: all of `TASKS` but reasoning_gym."""

from dataclasses import replace
from typing import Any

from hybrid_train.evaluation.tasks import TASKS
from hybrid_train.schema.evaluation import Tasks

OWN = tuple(name for name in TASKS if name != "reasoning_gym")


def settings_of(name: str, **changes: Any) -> Tasks:
    """The usual settings but for some of one task."""
    usual = Tasks()
    return replace(usual, **{name: replace(getattr(usual, name), **changes)})
