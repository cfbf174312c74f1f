"""What is shown and where the metrics go; `metrics.jsonl` is always written."""

import enum
from dataclasses import dataclass, field

from hybrid_train.schema.limits import Count, Name


class WandbMode(enum.Enum):
    """Whether Weights & Biases is used, and whether it may talk to its server."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(kw_only=True)
class Wandb:
    """Weights & Biases; its files go into the run folder."""

    mode: WandbMode = WandbMode.disabled
    project: Name = "hybrid_train"
    entity: Name | None = None
    name: Name | None = None  # None: name of the run folder


@dataclass(kw_only=True)
class Tracking:
    """What is shown and where the metrics go."""

    console_interval: Count = 10  # steps between plain lines when there is no terminal
    tensorboard: bool = False
    wandb: Wandb = field(default_factory=Wandb)
