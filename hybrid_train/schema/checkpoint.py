"""When to save, what to keep, what to start from."""

import enum
from dataclasses import dataclass

from hybrid_train.schema.limits import Count, CountOrNone, FileName


class LoadOnly(enum.Enum):
    """Part of a checkpoint that is loaded."""

    weights = "weights"


@dataclass(kw_only=True)
class Checkpoint:
    """When to save, what to keep, what to start from. A run resumes its own latest by itself."""

    interval: CountOrNone = 500  # steps between saves; 0: only at the end
    keep: Count = 2  # newest checkpoints that stay
    async_save: bool = True  # train on while it is written, from a copy in host memory
    load: FileName | None = None  # a run folder or one checkpoint; the model is that of the run
    load_only: LoadOnly | None = None  # None: weights, optimizer and position
