"""The optimizer."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid_train.config.problems import Problem, at_least, within


class ParameterKind(enum.Enum):
    """Parameters that a rule can name; the patterns of their names are in optim/groups.py."""

    norms = "norms"
    biases = "biases"
    A_log = "A_log"  # decay rates of the Mamba heads
    D = "D"  # direct path of the Mamba heads
    dt_bias = "dt_bias"  # step sizes of the Mamba heads
    convolutions = "convolutions"  # taps of the Mamba convolution
    routers = "routers"
    embeddings = "embeddings"  # with the head where both are one
    heads = "heads"


@dataclass(kw_only=True)
class AdamW:
    """AdamW with decoupled weight decay, on all parameters but those of `no_decay`."""

    kind: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: list[ParameterKind] = field(
        default_factory=lambda: [
            ParameterKind.norms,
            ParameterKind.biases,
            ParameterKind.A_log,
            ParameterKind.D,
            ParameterKind.dt_bias,
        ]
    )
    clip_grad_norm: float = 1.0  # 0: no clipping

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from within(0, 1, beta1=self.beta1, beta2=self.beta2)
        yield from at_least(
            0, eps=self.eps, weight_decay=self.weight_decay, clip_grad_norm=self.clip_grad_norm
        )
