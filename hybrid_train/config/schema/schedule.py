"""Learning rate over the run. Lengths are in tokens."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING

from hybrid_train.config.problems import Problem, at_least, within
from hybrid_train.config.units import TOKENS_RULE, is_tokens


class DecayShape(enum.Enum):
    """How the rate falls during decay."""

    linear = "linear"
    cosine = "cosine"
    exponential = "exponential"
    minus_sqrt = "minus_sqrt"


@dataclass(kw_only=True)
class Schedule:
    """Constant rate after a linear warm-up; the base of the others."""

    kind: str = "constant"
    peak_lr: float = MISSING
    warmup_tokens: str = "0"

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(0, peak_lr=self.peak_lr)
        if not is_tokens(self.warmup_tokens):
            yield Problem("warmup_tokens", self.warmup_tokens, TOKENS_RULE)


@dataclass(kw_only=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to the final rate at the end of training."""

    kind: str = "cosine"
    final_lr_ratio: float = 0.01  # final rate / peak rate

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        yield from within(0, 1, final_lr_ratio=self.final_lr_ratio)


@dataclass(kw_only=True)
class Wsd(Cosine):
    """Warm up, stay, decay over the last `decay_tokens` of training."""

    kind: str = "wsd"
    decay_tokens: str = MISSING
    decay_shape: DecayShape = DecayShape.minus_sqrt

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        if not is_tokens(self.decay_tokens):
            yield Problem("decay_tokens", self.decay_tokens, TOKENS_RULE)
