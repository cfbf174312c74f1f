"""What a resumed run must know beside weights and optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Position of a run; saved with every checkpoint. The tokens say which data is next."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen by all ranks
    source_tokens: dict[str, int] = field(default_factory=dict)  # the labels of each source

    def advance(self, *, tokens: int, source_tokens: Mapping[str, int]) -> None:
        """Count one step."""
        self.step += 1
        self.tokens += tokens
        for source, count in source_tokens.items():
            self.source_tokens[source] = self.source_tokens.get(source, 0) + count
