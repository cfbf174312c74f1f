"""The root of a comparison of a checkpoint with a Hugging Face folder."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.config.problems import Problem, at_least
from hybrid_train.config.schema.runtime import Runtime


@dataclass(kw_only=True)
class VerifyJob:
    """Names, shapes, formats and values of both sides, then logits of the same tokens."""

    checkpoint: str = MISSING  # a run folder or one checkpoint of it
    hf: str = MISSING  # Hugging Face folder
    logits: bool = True  # needs transformers, and room for both models in float32
    length: int = 300  # tokens of each sequence
    sequences: int = 2
    tolerance: float = 1e-4  # of a logit, as a share of the standard deviation of all
    seed: int = 1234  # of the tokens
    runtime: Runtime = field(default_factory=Runtime)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(1, length=self.length, sequences=self.sequences)
        yield from at_least(0, tolerance=self.tolerance, seed=self.seed)
