"""What is shown, where the metrics go, and which steps are profiled."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid_train.schema.limits import Count, CountOrNone, Name
from hybrid_train.schema.problems import Problem

PROFILE_FOLDER = "profile"  # in the run folder, of traces and snapshots
TRACE_VIEWER = "ui.perfetto.dev"  # a web page that reads the file on the machine of its reader


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


class ProfileTool(enum.Enum):
    """Who traces the steps."""

    none = "none"
    torch = "torch"  # torch.profiler writes a trace, which Perfetto and chrome://tracing show
    nsys = "nsys"  # cudaProfilerStart and Stop, for nsys --capture-range=cudaProfilerApi


@dataclass(kw_only=True)
class Profile:
    """Which steps are traced, and whether memory is recorded; files go into RUN/profile."""

    tool: ProfileTool = ProfileTool.none
    start: Count = 10  # first traced step of the run; the first step of all is 1
    steps: Count = 3  # how many are traced
    ranks: list[CountOrNone] = field(default_factory=lambda: [0])  # processes that are traced
    shapes: bool = False  # torch: note the shapes of all operands
    stacks: bool = False  # torch: note the lines of Python that asked for each operation
    memory: bool = False  # torch: note what each operation allocates
    snapshot: bool = False  # on a GPU: record allocations, write them when memory runs out
    equal_load: bool = False  # give each expert as many tokens, whatever the router says: to time
    snapshot_events: Count = 100_000  # allocations that are remembered, the newest

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if self.tool is not ProfileTool.none and not self.ranks:
            yield Problem("ranks", "[]", "must name a process to trace", "[0]")
