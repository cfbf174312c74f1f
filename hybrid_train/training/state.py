"""What a resumed run must know beside weights and optimizer."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """Position of a run; saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen by all ranks
    consumed_sequences: int = 0  # position in the data

    def advance(self, *, sequences: int, sequence_length: int) -> None:
        """Count one step."""
        self.step += 1
        self.consumed_sequences += sequences
        self.tokens += sequences * sequence_length
