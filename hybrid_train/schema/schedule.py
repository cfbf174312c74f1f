"""Learning rate over the run. Lengths are in tokens."""

import enum
from dataclasses import dataclass

from omegaconf import MISSING

from hybrid_train.schema.limits import Rate, Share, TokenCountOrNone


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
    peak_lr: Rate = MISSING
    warmup_tokens: TokenCountOrNone = "0"


@dataclass(kw_only=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to the final rate at the end of training."""

    kind: str = "cosine"
    final_lr_ratio: Share = 0.01  # final rate / peak rate


@dataclass(kw_only=True)
class Wsd(Cosine):
    """Warm up, stay, decay over the last `decay_tokens` of training."""

    kind: str = "wsd"
    decay_tokens: TokenCountOrNone = MISSING
    decay_shape: DecayShape = DecayShape.minus_sqrt
