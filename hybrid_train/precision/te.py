"""Gateway to Transformer Engine: our settings as its recipes, on the GPU that is there.

The library is imported only where a recipe or a module of it is asked for. Files and lines are
those of version 2.20.2.
"""

import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

from hybrid_train.config.rules_of_hardware import refused_by
from hybrid_train.planning.gpu_formats import Gpu
from hybrid_train.precision.recipes import Element, Scale, schemes
from hybrid_train.runtime import optional
from hybrid_train.schema.precision import Gemm, GemmFormat, Precision
from hybrid_train.schema.problems import ConfigError
from hybrid_train.schema.train import TrainJob


def present_gpu() -> Gpu:
    """Return the GPU of this process; there must be one."""
    cuda = [int(part) for part in str(torch.version.cuda).split(".")]
    capability = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), capability, (cuda[0], cuda[1]))


def require_formats(job: TrainJob) -> None:
    """Raise a ConfigError if the present GPU lacks a format that a job asks for, or its scales."""
    if found := list(refused_by(present_gpu(), job)):
        raise ConfigError(found)


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
