"""A card: what one kind of GPU has and can do, as a file of conf/hardware says it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.limits import Name, Range
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Teraflops

Gigabytes = Annotated[float, Range(0.1, 10**5)]
TerabytesPerSecond = Annotated[float, Range(0.001, 1000)]
GigabytesPerSecond = Annotated[float, Range(0.1, 10**6)]
_CAPABILITY = re.compile(r"(\d{1,3})\.(\d{1,2})")
_FP8 = (
    GemmFormat.fp8_tensorwise,
    GemmFormat.fp8_delayed,
    GemmFormat.fp8_blockwise,
    GemmFormat.mxfp8,
)
_FP4 = (GemmFormat.nvfp4, GemmFormat.mxfp4)


@dataclass(kw_only=True)
class Peaks:
    """Operations of GEMMs, dense (data sheets double them for sparsity), summed in float32."""

    bf16: Teraflops | None = None  # what MFU is a share of; None: no figure, or no such GEMMs
    fp8: Teraflops | None = None
    fp4: Teraflops | None = None


@dataclass(kw_only=True)
class Card:
    """One kind of GPU. The formats that it multiplies follow from its compute capability."""

    title: Name = MISSING  # as people call it
    device_names: list[str] = MISSING  # whole names, as torch.cuda.get_device_name() says them
    compute_capability: str = MISSING  # "9.0"; planning/gpu_formats.py has what follows from it
    memory_gb: Gigabytes = MISSING  # in 1e9 bytes
    memory_tb_s: TerabytesPerSecond | None = None  # bandwidth of that memory; None: no figure
    peak_tflops: Peaks = field(default_factory=Peaks)
    link_gb_s: GigabytesPerSecond | None = None  # to other GPUs, both directions; None: no figure
    nvlink_gpus: Annotated[int, Range(1, 10**4)] = 1  # of one NVLink domain; 1: the link is PCIe

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if not _CAPABILITY.fullmatch(self.compute_capability):
            rule = 'must be two whole numbers with a point, as in "9.0"'
            yield Problem("compute_capability", self.compute_capability, rule)

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability as numbers that compare: "12.0" -> (12, 0)."""
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    def peak_of(self, format: GemmFormat) -> float | None:
        """Return the dense peak of GEMMs in a format, in TFLOP/s; None where there is no figure.

        GEMMs in float32 get the figure of bfloat16, which is more than theirs.
        """
        if format in _FP8:
            return self.peak_tflops.fp8
        return self.peak_tflops.fp4 if format in _FP4 else self.peak_tflops.bf16
