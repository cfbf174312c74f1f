"""What one step tells the hooks."""

from dataclasses import dataclass, field


@dataclass
class StepReport:
    """Outcome of one step, the same on every rank."""

    loss: float  # first term of the objective, by what divides it; of next_token in nats
    grad_norm: float  # before clipping
    lr: float
    seconds: float
    sequences: int  # of the global batch
    skipped: str = ""  # why the update was not made; empty: it was
    skipped_kind: str = ""  # the same in a word: nonfinite, spike, no labels
    source_tokens: dict[str, int] = field(default_factory=dict)  # labels, where there are several
    metrics: dict[str, float] = field(default_factory=dict)  # by name of tracking/metrics.py
