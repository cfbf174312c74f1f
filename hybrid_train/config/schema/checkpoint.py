"""When to save, what to keep, what to start from."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.config.problems import Problem, at_least


class LoadOnly(enum.Enum):
    """Part of a checkpoint that is loaded."""

    weights = "weights"


@dataclass(kw_only=True)
class Checkpoint:
    """When to save, what to keep, what to start from. A run resumes its own latest by itself."""

    interval: int = 500  # steps between saves; 0: only at the end
    keep: int = 2  # newest checkpoints that stay
    async_save: bool = True  # train on while it is written, from a copy in host memory
    load: str | None = None  # a run folder or one checkpoint of it; the model is that of the run
    load_only: LoadOnly | None = None  # None: weights, optimizer and position

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(0, interval=self.interval)
        yield from at_least(1, keep=self.keep)
