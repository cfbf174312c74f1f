"""The optimizer."""

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.config.problems import Problem, at_least, within


@dataclass(kw_only=True)
class AdamW:
    """AdamW with decoupled weight decay; parameters of one dimension and biases do not decay."""

    kind: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0  # 0: no clipping

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from within(0, 1, beta1=self.beta1, beta2=self.beta2)
        yield from at_least(
            0, eps=self.eps, weight_decay=self.weight_decay, clip_grad_norm=self.clip_grad_norm
        )
