"""What a checkpoint holds: one network, or several by their names."""

from dataclasses import dataclass
from typing import Any

from hybrid_train.megatron.groups import ProcessGroups
from hybrid_train.megatron.optimizers import MegatronOptimizer


@dataclass(frozen=True)
class Held:
    """A network as a checkpoint holds it.

    Attributes:
        chunks: model chunks of this process, wrapped for data parallelism.
        optimizer: over them.
        groups: the processes that hold the other parts.
        name: stands in front of all its keys; empty where it is the only one.
    """

    chunks: list[Any]
    optimizer: MegatronOptimizer
    groups: ProcessGroups
    name: str = ""


@dataclass(frozen=True)
class Content:
    """All that a checkpoint holds beside random states; the networks are on one layout."""

    networks: tuple[Held, ...]
