"""What is shown and where the metrics go; `metrics.jsonl` is always written."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid_train.config.problems import Problem, at_least


class WandbMode(enum.Enum):
    """Whether Weights & Biases is used, and whether it may talk to its server."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(kw_only=True)
class Wandb:
    """Weights & Biases; its files go into the run folder."""

    mode: WandbMode = WandbMode.disabled
    project: str = "hybrid_train"
    entity: str | None = None
    name: str | None = None  # None: name of the run folder


@dataclass(kw_only=True)
class Tracking:
    """What is shown and where the metrics go."""

    console_interval: int = 10  # steps between plain lines when there is no terminal
    tensorboard: bool = False
    wandb: Wandb = field(default_factory=Wandb)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(1, console_interval=self.console_interval)
