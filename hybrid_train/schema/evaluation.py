"""What is asked of a model to see how good it is: tasks with their settings, and how many items."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated

from hybrid_train.schema.limits import (
    COLDEST,
    Count,
    CountOrNone,
    Factor,
    FileName,
    Length,
    Range,
    Seed,
    TokenCount,
)
from hybrid_train.schema.names import listed, nearest
from hybrid_train.schema.problems import Problem


@dataclass(kw_only=True)
class HeldOut:
    """Loss, bits per byte and accuracy of the next token on held-out documents, by source."""

    files: list[FileName] = field(default_factory=list)  # prefixes; empty: validation of the run
    tokens: TokenCount = "200k"  # of each source, in whole documents that the seed draws
    length: Length | None = None  # tokens that are read at once; null: as the run was trained


@dataclass(kw_only=True)
class Tasks:
    """The settings of every task, by its name."""

    heldout: HeldOut = field(default_factory=HeldOut)


@dataclass(kw_only=True)
class Asking:
    """Which tasks a model is asked, and how."""

    tasks: list[str] = field(default_factory=list)  # names, as in `task`
    task: Tasks = field(default_factory=Tasks)
    limit: Count | None = None  # items of each task at most
    samples: Annotated[int, Range(1, 2**16)] = 1  # answers to each item; several give pass@k
    temperature: Factor = 0.0  # of answers that are drawn; 0: the most likely token each time
    seed: Seed = 1234  # of items, answers and intervals
    batch: Annotated[int, Range(1, 4096)] = 8  # answers that grow together

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from _task_problems(self.task_names)
        if 0 < self.temperature < COLDEST:
            rule = f"must be 0, the most likely token, or at least {COLDEST}"
            yield Problem("temperature", self.temperature, rule, 0)
        if self.samples > 1 and self.temperature == 0:
            rule = "must be 1 at temperature 0, where all answers of an item are equal"
            yield Problem("samples", self.samples, rule, 1)

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks."""
        return listed(self.tasks)


@dataclass(kw_only=True)
class Evaluation(Asking):
    """Tasks that a model is asked while it trains; it trains on to the bit as if it were not."""

    interval: CountOrNone = 0  # steps; 0: never

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        if self.interval and not self.task_names:
            rule = f"must name a task where there is an interval: {', '.join(_known())}"
            yield Problem("tasks", "[]", rule)


def _known() -> list[str]:
    return [one.name for one in fields(Tasks)]


def _task_problems(names: list[str]) -> Iterator[Problem]:
    """Yield names that no task has, and those that are there twice."""
    for number, name in enumerate(names):
        if name not in _known():
            rule = f"is no task; there are {', '.join(_known())}"
            yield Problem("tasks", name, rule, nearest(name, _known()))
        elif name in names[:number]:
            yield Problem("tasks", name, "is there twice")
