"""Number formats: of GEMMs, by layer and module, and of everything else."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.layer_ranges import RULE, is_range
from hybrid_train.schema.limits import CountOrNone, Range
from hybrid_train.schema.problems import Problem

History = Annotated[int, Range(1, 2**16)]  # each tensor keeps so many numbers


class NumberFormat(enum.Enum):
    """Format of weights, activations and whatever else is not quantized."""

    fp32 = "fp32"
    bf16 = "bf16"


class GemmFormat(enum.Enum):
    """Format of the GEMMs of linear layers."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8_tensorwise = "fp8_tensorwise"  # one scale a tensor, from its present largest value
    fp8_delayed = "fp8_delayed"  # one scale a tensor, from the largest values of earlier steps
    fp8_blockwise = "fp8_blockwise"  # 128x128 for weights, 1x128 for activations and gradients
    mxfp8 = "mxfp8"  # 32 neighbours share a power of two
    nvfp4 = "nvfp4"  # 16 neighbours share an E4M3 scale, under one float32 scale a tensor
    mxfp4 = "mxfp4"  # 32 neighbours share a power of two; no hardware path, for comparison


class Gemm(enum.Enum):
    """The three GEMMs of a linear layer."""

    fprop = "fprop"  # output = input x weight
    dgrad = "dgrad"  # gradient of the input
    wgrad = "wgrad"  # gradient of the weight


class Backend(enum.Enum):
    """Who computes quantized GEMMs."""

    auto = "auto"  # the hardware on a GPU, which refuses what it lacks; emulated on a CPU
    native = "native"  # Transformer Engine
    emulated = "emulated"  # quantized operands, GEMM in float32; any machine


class GradientElement(enum.Enum):
    """Element of FP8 gradients."""

    e4m3 = "e4m3"
    e5m2 = "e5m2"


class AmaxChoice(enum.Enum):
    """Which of the remembered largest values scales the next tensor (fp8_delayed)."""

    max = "max"
    most_recent = "most_recent"


@dataclass(kw_only=True)
class PrecisionRule:
    """An exception: some layers, modules and GEMMs in another format."""

    format: GemmFormat = MISSING
    layers: str = "all"  # "first 2", "last 15%", "7", "3-9"; of the main layers, from 1
    modules: list[str] = field(default_factory=list)  # "mamba.out_proj", "attention"; empty: all
    gemms: list[Gemm] = field(default_factory=list)  # empty: all three

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if not is_range(self.layers):
            yield Problem("layers", self.layers, RULE, "all")

    def __str__(self) -> str:
        words = [] if self.layers.strip() == "all" else [f"layers {self.layers.strip()}"]
        words += [", ".join(self.modules)] if self.modules else []
        words += [", ".join(one.value for one in self.gemms)] if self.gemms else []
        return "; ".join(words) or "everything"


@dataclass(kw_only=True)
class Precision:
    """Format of the GEMMs; that of master weights and moments is the optimizer's."""

    format: GemmFormat = GemmFormat.bf16
    exceptions: list[PrecisionRule] = field(default_factory=list)  # the first that matches counts
    unquantized: NumberFormat | None = None  # null: fp32 with format=fp32, else bf16
    backend: Backend = Backend.auto
    gradient_element: GradientElement | None = None  # of FP8; null: e5m2 with one scale a tensor
    power_of_two_scales: bool | None = None  # of FP8 with float32 scales; null: in blocks
    amax_history: History = 16  # steps that fp8_delayed remembers; native: microbatches
    amax_choice: AmaxChoice = AmaxChoice.max
    hadamard: bool = True  # nvfp4: rotate the operands of wgrad
    stochastic_rounding: bool = True  # nvfp4: of gradients
    square_weight_blocks: bool = True  # nvfp4: 16x16 for weights
    strict: bool = True  # stop where a GEMM did not run as asked
    statistics_interval: CountOrNone = 100  # steps; 0: no underflow, saturation, error
    reduce_gradients_in_fp32: bool = True
    fp8_attention: bool = False  # the GEMMs of softmax attention too; on a GPU
    fp8_param_gather: bool = False  # keep and gather weights of FP8 layers in FP8, not bfloat16

    @property
    def base(self) -> NumberFormat:
        """Format of everything that is not quantized."""
        if self.unquantized is not None:
            return self.unquantized
        is_fp32 = self.format is GemmFormat.fp32
        return NumberFormat.fp32 if is_fp32 else NumberFormat.bf16

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        plain = {GemmFormat.fp32: NumberFormat.fp32, GemmFormat.bf16: NumberFormat.bf16}
        wanted = plain.get(self.format)
        if self.unquantized is not None and wanted not in (None, self.unquantized):
            rule = f"must be null or {wanted.value} with format={self.format.value}"
            yield Problem("unquantized", self.unquantized.value, rule, "null")
