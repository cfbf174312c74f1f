"""Gateway to Transformer Engine: which GPU computes which format, and our settings as its recipes.

`SUPPORT` holds the facts of its `_compute_*_support` functions (pytorch/quantization.py 141-183),
so that a machine without a GPU can be asked about one. The library is imported only where a recipe
or a module of it is asked for. Files and lines are those of version 2.20.2.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from hybrid_train.anatomy.gemm_formats import formats_of
from hybrid_train.precision.recipes import Element, Scale, schemes
from hybrid_train.runtime import optional
from hybrid_train.schema.precision import Gemm, GemmFormat, Precision
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob

Version = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """A GPU, as far as formats depend on it."""

    name: str
    capability: Version  # compute capability
    cuda: Version  # version that torch was built with


@dataclass(frozen=True)
class Support:
    """GPUs that compute a format: capabilities in [first, end) with a CUDA version."""

    first: Version
    end: Version | None = None  # the first that does not, if there is one
    cuda: Version = (0, 0)

    def has(self, gpu: Gpu) -> bool:
        """Tell whether a GPU is one of them."""
        below = self.end is None or gpu.capability < self.end
        return self.first <= gpu.capability and below and self.cuda <= gpu.cuda


_FP8 = (Support((8, 9), (9, 0), cuda=(12, 1)), Support((9, 0)))
SUPPORT: dict[GemmFormat, tuple[Support, ...]] = {
    GemmFormat.fp32: (Support((0, 0)),),
    GemmFormat.bf16: (Support((8, 0)),),
    GemmFormat.fp8_tensorwise: _FP8,
    GemmFormat.fp8_delayed: _FP8,
    # From 10.0 on it is a GEMM of MXFP8 operands of the same values (csrc/extensions/gemm.cpp
    # 319), which takes scales that are powers of two.
    GemmFormat.fp8_blockwise: (Support((9, 0), cuda=(12, 9)),),
    GemmFormat.mxfp8: (Support((10, 0), (12, 0)),),
    GemmFormat.nvfp4: (Support((10, 0)),),
    GemmFormat.mxfp4: (),
}
_WITHOUT_FLOAT_SCALES = Support((10, 0))  # in blocks
# What comes nearest to a format, best first: as many bits, then scales as fine.
_NEAREST = {
    GemmFormat.fp32: (),
    GemmFormat.bf16: (GemmFormat.fp32,),
    GemmFormat.fp8_tensorwise: (GemmFormat.bf16,),
    GemmFormat.fp8_delayed: (GemmFormat.fp8_tensorwise, GemmFormat.bf16),
    GemmFormat.fp8_blockwise: (
        GemmFormat.mxfp8,
        GemmFormat.fp8_tensorwise,
        GemmFormat.bf16,
    ),
    GemmFormat.mxfp8: (
        GemmFormat.fp8_blockwise,
        GemmFormat.fp8_tensorwise,
        GemmFormat.bf16,
    ),
    GemmFormat.nvfp4: (
        GemmFormat.mxfp8,
        GemmFormat.fp8_blockwise,
        GemmFormat.fp8_tensorwise,
        GemmFormat.bf16,
    ),
    GemmFormat.mxfp4: (
        GemmFormat.nvfp4,
        GemmFormat.mxfp8,
        GemmFormat.fp8_blockwise,
        GemmFormat.fp8_tensorwise,
        GemmFormat.bf16,
    ),
}


def is_native(format: GemmFormat, gpu: Gpu) -> bool:
    """Tell whether a GPU computes GEMMs of a format itself."""
    return any(support.has(gpu) for support in SUPPORT[format])


def nearest_native(format: GemmFormat, gpu: Gpu) -> GemmFormat:
    """Return the format itself where a GPU has it, else the nearest one that it has."""
    candidates = (format, *_NEAREST[format], GemmFormat.fp32)
    return next(one for one in candidates if is_native(one, gpu))


def require_native(formats: Iterable[GemmFormat], gpu: Gpu) -> None:
    """Raise a UserError that names every format that a GPU lacks, and the nearest that it has."""
    lacking = [one for one in dict.fromkeys(formats) if not is_native(one, gpu)]
    if lacking:
        nearest = "; ".join(
            f"{one.value}, nearest: {nearest_native(one, gpu).value}" for one in lacking
        )
        raise UserError(
            f"{_shown(gpu)} does not compute these formats of GEMMs: {nearest}\n"
            "precision.backend=emulated runs them on any machine"
        )


def present_gpu() -> Gpu:
    """Return the GPU of this process; there must be one."""
    cuda = [int(part) for part in str(torch.version.cuda).split(".")]
    capability = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), capability, (cuda[0], cuda[1]))


def require_formats(job: TrainJob) -> None:
    """Raise a UserError if the present GPU lacks a format that a job asks for."""
    require_formats_on(job, present_gpu())


def require_formats_on(job: TrainJob, gpu: Gpu) -> None:
    """Raise a UserError if a GPU lacks a format that a job asks for, or its scales."""
    found = formats_of(job.model, job.precision)
    formats = [format for one in found.values() for format in one.formats.values()]
    require_native(formats, gpu)
    float_scales = job.precision.power_of_two_scales is False
    if GemmFormat.fp8_blockwise in formats and float_scales and _WITHOUT_FLOAT_SCALES.has(gpu):
        raise UserError(
            f"{_shown(gpu)} takes fp8_blockwise with scales that are powers of two alone: "
            "precision.power_of_two_scales=null, or precision.backend=emulated"
        )


def _shown(gpu: Gpu) -> str:
    capability, cuda = (".".join(map(str, version)) for version in (gpu.capability, gpu.cuda))
    return f"{gpu.name} (compute capability {capability}, CUDA {cuda})"


def recipe(format: GemmFormat, precision: Precision) -> Any:
    """Return the recipe object of a quantized format, every option of it set.

    Nothing is left to Transformer Engine's environment variables: they are read once at its import,
    and would be a second place for settings.

    Raises:
        UserError: if Transformer Engine is not installed.
    """
    optional.require("transformer_engine", f"precision.format={format.value} on a GPU")
    return _BUILDERS[format](importlib.import_module("transformer_engine.common.recipe"), precision)


def linear_module(name: str) -> ModuleType:
    """Return the module that holds a kind of linear layer, and the function that multiplies in it.

    Args:
        name: "linear", "layernorm_linear" or "grouped_linear".
    """
    return importlib.import_module(f"transformer_engine.pytorch.module.{name}")


def fp8_format(format: GemmFormat, precision: Precision) -> str:
    """Return how core calls the elements of FP8: "hybrid" with gradients in E5M2, else "e4m3"."""
    found = schemes(format, Gemm.dgrad, precision)
    assert found is not None, "asked of quantized formats only"
    return "hybrid" if found[0].element is Element.e5m2 else "e4m3"


def _elements(te: Any, format: GemmFormat, precision: Precision) -> Any:
    return te.Format[fp8_format(format, precision).upper()]


def _has_power_of_two(format: GemmFormat, precision: Precision) -> bool:
    found = schemes(format, Gemm.fprop, precision)
    return found is not None and found[0].scale is Scale.power_of_two


def _with_scales(te: Any, made: Any, *, power_of_two: bool) -> Any:
    """Set the scales of all operands.

    The constructor's own switch does not: the options of operands are made with the class, from
    the environment (common/recipe/__init__.py, Float8CurrentScaling and Float8BlockScaling).
    """
    options = te.QParams(power_2_scale=power_of_two, amax_epsilon=0.0)
    made.fp8_quant_fwd_inp = options
    made.fp8_quant_fwd_weight = options
    made.fp8_quant_bwd_grad = options
    return made


def _tensorwise(te: Any, precision: Precision) -> Any:
    format = GemmFormat.fp8_tensorwise
    power_of_two = _has_power_of_two(format, precision)
    made = te.Float8CurrentScaling(
        use_power_2_scales=power_of_two,
        fp8_format=_elements(te, format, precision),
        backward_override=None,
    )
    return _with_scales(te, made, power_of_two=power_of_two)


def _delayed(te: Any, precision: Precision) -> Any:
    return te.DelayedScaling(
        margin=0,
        fp8_format=_elements(te, GemmFormat.fp8_delayed, precision),
        amax_history_len=precision.amax_history,
        amax_compute_algo=precision.amax_choice.value,
        backward_override=None,
    )


def _blockwise(te: Any, precision: Precision) -> Any:
    format = GemmFormat.fp8_blockwise
    power_of_two = _has_power_of_two(format, precision)
    made = te.Float8BlockScaling(
        use_f32_scales=not power_of_two,
        fp8_format=_elements(te, format, precision),
        backward_override=None,
    )
    return _with_scales(te, made, power_of_two=power_of_two)


def _mxfp8(te: Any, precision: Precision) -> Any:
    elements = _elements(te, GemmFormat.mxfp8, precision)
    return te.MXFP8BlockScaling(fp8_format=elements, backward_override=None)


def _nvfp4(te: Any, precision: Precision) -> Any:
    return te.NVFP4BlockScaling(
        disable_rht=not precision.hadamard,
        disable_stochastic_rounding=not precision.stochastic_rounding,
        disable_2d_quantization=not precision.square_weight_blocks,
        row_scaled_activation=False,
        nvfp4_4over6="none",
        backward_override=None,
    )


_BUILDERS: dict[GemmFormat, Callable[[Any, Precision], Any]] = {
    GemmFormat.fp8_tensorwise: _tensorwise,
    GemmFormat.fp8_delayed: _delayed,
    GemmFormat.fp8_blockwise: _blockwise,
    GemmFormat.mxfp8: _mxfp8,
    GemmFormat.nvfp4: _nvfp4,
}


def overlap_tensor_ranks(
    tokens: int, hidden_size: int, tensor: int, *, formats: Iterable[GemmFormat]
) -> None:
    """Make the buffers through which GEMMs and collectives of tensor ranks run at once.

    Every process calls it before layers are built. It has never run: no GPU was at hand.

    Args:
        tokens: of a microbatch on the ranks of one tensor group.
        hidden_size: of the model.
        tensor: ranks of a group.
        formats: of the GEMMs; those of 8 bits need buffers of their own.
    """
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    modes = base.UserBufferQuantizationMode
    kept = {
        modes.NONE if one in (GemmFormat.bf16, GemmFormat.fp32) else modes.FP8 for one in formats
    }
    base.destroy_ub()
    base.initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=tensor,
        quantization_modes=sorted(kept, key=str),
        bootstrap_backend="nccl",
    )
