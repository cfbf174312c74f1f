"""The machine a process runs on."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.config.problems import Problem, at_least


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
    threads: int | None = None  # CPU threads per process; None: cores / local processes
    peak_tflops: float | None = None  # peak for MFU; None: table of GPUs, or measured on a CPU
    timeout_s: float = 600  # a collective that takes longer stops the run
    hang_timeout_s: float = 1800  # a process silent for longer is ended, with its stack; 0: never

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(1, threads=self.threads, timeout_s=self.timeout_s)
        yield from at_least(0, hang_timeout_s=self.hang_timeout_s)
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            yield Problem("peak_tflops", self.peak_tflops, "must be more than 0", "null")
