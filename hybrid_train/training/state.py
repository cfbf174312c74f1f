"""What a resumed run must know beside weights and optimizer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Position of a run; saved with every checkpoint.

    The tokens say which data is next, where that follows from config and data; another source of
    batches keeps plain data of its own beside them.
    """

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen by all ranks
    source_tokens: dict[str, int] = field(default_factory=dict)  # the labels of each source
    batches: dict[str, Any] = field(default_factory=dict)  # see data.loader.BatchSource

    def advance(self, *, tokens: int, source_tokens: Mapping[str, int]) -> None:
        """Count one step."""
        self.step += 1
        self.tokens += tokens
        for source, count in source_tokens.items():
            self.source_tokens[source] = self.source_tokens.get(source, 0) + count

    def position(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; a source of batches without a state takes no place."""
        found = asdict(self)
        if not self.batches:
            del found["batches"]
        return found
