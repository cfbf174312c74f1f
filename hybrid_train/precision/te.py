"""Gateway to Transformer Engine: our precision section as its recipe objects.

Nothing is imported before it is asked for. Files and lines are those of version 2.20.2.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hybrid_train.precision.recipes import schemes
from hybrid_train.precision.schemes import Element, Scale
from hybrid_train.runtime import optional
from hybrid_train.schema.precision import Precision, Product, ProductFormat


def recipe(format: ProductFormat, precision: Precision) -> Any:
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


def fp8_format(format: ProductFormat, precision: Precision) -> str:
    """Return how core calls the elements of FP8: "hybrid" with gradients in E5M2, else "e4m3"."""
    found = schemes(format, Product.dgrad, precision)
    assert found is not None, "asked of quantized formats only"
    return "hybrid" if found[0].element is Element.e5m2 else "e4m3"


def _elements(te: Any, format: ProductFormat, precision: Precision) -> Any:
    return te.Format[fp8_format(format, precision).upper()]


def _has_power_of_two(format: ProductFormat, precision: Precision) -> bool:
    found = schemes(format, Product.fprop, precision)
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
    format = ProductFormat.fp8_tensorwise
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
        fp8_format=_elements(te, ProductFormat.fp8_delayed, precision),
        amax_history_len=precision.amax_history,
        amax_compute_algo=precision.amax_choice.value,
        backward_override=None,
    )


def _blockwise(te: Any, precision: Precision) -> Any:
    format = ProductFormat.fp8_blockwise
    power_of_two = _has_power_of_two(format, precision)
    made = te.Float8BlockScaling(
        use_f32_scales=not power_of_two,
        fp8_format=_elements(te, format, precision),
        backward_override=None,
    )
    return _with_scales(te, made, power_of_two=power_of_two)


def _mxfp8(te: Any, precision: Precision) -> Any:
    elements = _elements(te, ProductFormat.mxfp8, precision)
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


_BUILDERS: dict[ProductFormat, Callable[[Any, Precision], Any]] = {
    ProductFormat.fp8_tensorwise: _tensorwise,
    ProductFormat.fp8_delayed: _delayed,
    ProductFormat.fp8_blockwise: _blockwise,
    ProductFormat.mxfp8: _mxfp8,
    ProductFormat.nvfp4: _nvfp4,
}
