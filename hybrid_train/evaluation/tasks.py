"""The table of tasks by name; a new one is a class and a line here, and a section of settings."""

from collections.abc import Callable, Sequence
from typing import Any

from hybrid_train.evaluation.code_tasks import FillInTask, NextLineTask
from hybrid_train.evaluation.drawn_tasks import (
    ArithmeticTask,
    BracketsTask,
    CopyingTask,
    RecallTask,
    SumsTask,
)
from hybrid_train.evaluation.items import Task
from hybrid_train.evaluation.needle import NeedleTask
from hybrid_train.evaluation.reasoning_gym import ReasoningGymTask
from hybrid_train.schema.evaluation import Tasks
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError

# By the name of the field of `Tasks` with the settings that the class is called with.
TASKS: dict[str, Callable[[Any], Task]] = {
    "next_line": NextLineTask,
    "fill_in": FillInTask,
    "copying": CopyingTask,
    "recall": RecallTask,
    "brackets": BracketsTask,
    "sums": SumsTask,
    "needle": NeedleTask,
    "arithmetic": ArithmeticTask,
    "reasoning_gym": ReasoningGymTask,
}


def build_tasks(names: Sequence[str], settings: Tasks) -> list[Task]:
    """Build tasks of their settings, in the order of the names.

    Raises:
        UserError: if there is no task of a name, or a library that one needs is not installed.
    """
    for name in names:
        if name not in TASKS:
            near = nearest(name, TASKS)
            hint = f"; nearest: {near}" if near else ""
            raise UserError(f"tasks: {name!r} is no task; there are {', '.join(TASKS)}{hint}")
    return [TASKS[name](getattr(settings, name)) for name in names]
