"""The machine a process runs on."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from hybrid_train.schema.limits import Count, Range, Seconds, SecondsOrMore, Workers
from hybrid_train.schema.problems import Problem

SHORTEST_SILENCE_S = 5  # of a process that builds a model or saves
Teraflops = Annotated[float, Range(1e-6, 10**6)]


class Device(enum.Enum):
    """Kind of device; `auto` takes a GPU where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Kernels(enum.Enum):
    """Whose kernels the model uses; `auto` takes the libraries where they can run."""

    auto = "auto"
    plain = "plain"  # plain PyTorch everywhere
    fused = "fused"  # Transformer Engine and mamba-ssm; an error where they are missing


@dataclass(kw_only=True)
class Runtime:
    """Device, kernels and limits of a process."""

    device: Device = Device.auto
    kernels: Kernels = Kernels.auto
    threads: Workers | None = None  # CPU threads per process; None: cores / local processes
    peak_tflops: Teraflops | None = None  # for MFU; None: of conf/hardware, on a CPU measured
    deterministic: bool = False  # the same numbers in every run, by slower kernels
    gc_interval: Count = 100  # steps between two collections of garbage, on all processes at once
    timeout_s: SecondsOrMore = 600  # a collective that takes longer stops the run
    hang_timeout_s: Seconds = 1800  # a process silent for longer is ended, with its stack; 0: never

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if 0 < self.hang_timeout_s < SHORTEST_SILENCE_S:
            rule = (
                f"must be 0 or at least {SHORTEST_SILENCE_S}: so long a healthy process is silent"
            )
            yield Problem("hang_timeout_s", self.hang_timeout_s, rule, SHORTEST_SILENCE_S)
