"""Quantized GEMMs by Transformer Engine: a job -> fields of TransformerConfig, layer by layer.

Every linear layer has its own entry in core's `quant_recipe`, unquantized ones too, so a layer
multiplies as its entry says whatever surrounds it. `fp8` and `fp4` of the whole model then decide
the rest: how far the tokens of experts are padded, and which checkpoint of activations is used.
Delayed scaling is the exception: only a region around the whole pass can have it, so its layers
have no entry. Lines are those of Megatron-Core 0.19.2.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.enums import Fp4Recipe, Fp8Recipe
from megatron.core.quantization.quant_config import GlobMatcher, RecipeConfig

from hybrid_train.anatomy.gemm_formats import (
    GATHERED_IN_FP8,
    MTP,
    UNQUANTIZED,
    Formats,
    Linear,
    formats_of,
    fp8_primary_weights,
)
from hybrid_train.anatomy.kinds import MTP_PROJECTION
from hybrid_train.megatron.plain import PLACES
from hybrid_train.precision import te
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import Pattern
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.train import TrainJob

_PLACE_OF = {kind: place for place, kind in PLACES.items()}
_FP8 = {
    GemmFormat.fp8_tensorwise: Fp8Recipe.tensorwise,
    GemmFormat.fp8_delayed: Fp8Recipe.delayed,
    GemmFormat.fp8_blockwise: Fp8Recipe.blockwise,
    GemmFormat.mxfp8: Fp8Recipe.mxfp8,
}
# Tokens of an expert are padded to 128, 32 or 16 by the format of the whole model
# (Transformer Engine, pytorch/quantization.py 262): the first of these that a layer has.
_WIDEST = (GemmFormat.nvfp4, GemmFormat.mxfp8)
UNQUANTIZED_KEY = "unquantized"
KEPT = ", weights kept"  # behind the key of a format: Transformer Engine builds them in FP8 (262)


def config_fields(job: TrainJob) -> dict[str, object]:
    """Return the fields of TransformerConfig; none where nothing is quantized."""
    used = quantized_formats(formats_of(job.model, job.precision))
    if not used:
        return {}
    format = next((one for one in _WIDEST if one in used), used[0])
    if format is GemmFormat.nvfp4:
        return {"fp4": "e2m1", "fp4_recipe": Fp4Recipe.nvfp4.value}
    fields: dict[str, object] = {
        "fp8": te.fp8_format(format, job.precision),
        "fp8_recipe": _FP8[format].value,
    }
    if format is GemmFormat.fp8_delayed:  # core makes this recipe itself, of these fields
        fields["fp8_amax_history_len"] = job.precision.amax_history
        fields["fp8_amax_compute_algo"] = job.precision.amax_choice.value
    return fields


def recipe_maker(precision: Precision) -> Callable[[str], Any]:
    """Return what makes the recipe object of a format by its name, each once."""

    @functools.cache
    def make(name: str) -> Any:
        return te.recipe(GemmFormat(name), precision)

    return make


def quantized_formats(formats: dict[Linear, Formats]) -> list[GemmFormat]:
    """Return the quantized formats of a model, in order of their first layer."""
    found = (format for one in formats.values() for format in one.formats.values())
    return [format for format in dict.fromkeys(found) if format not in UNQUANTIZED]


def recipe_of_chunk(
    model: Model, precision: Precision, cut: Pattern, chunk: int
) -> RecipeConfig | None:
    """Return the format of every linear layer that one model chunk holds; None: all unquantized.

    Core numbers the layers of a chunk from 0, whatever stands on other pipeline stages
    (hybrid_block.py 126), so each chunk has a recipe of its own.

    Args:
        model: of a job.
        precision: of the job; the three GEMMs of a layer have one format.
        cut: the pattern, cut into stages.
        chunk: number of the stage, in the order of the model.
    """
    formats = formats_of(model, precision)
    if not quantized_formats(formats):
        return None
    first = 1 + sum(map(len, cut.stages[:chunk]))
    held = range(first, first + len(cut.stages[chunk]))
    kept = fp8_primary_weights(model, precision)
    matchers, delayed = [], False
    for linear, one in formats.items():
        (format,) = set(one.formats.values())
        if format is GemmFormat.fp8_delayed:
            delayed = True
        elif linear.depth or linear.layer in held:
            key = UNQUANTIZED_KEY if format in UNQUANTIZED else format.value
            key += KEPT if linear in kept else ""
            matchers += [GlobMatcher(path, key) for path in paths_in_core(linear, first)]
    if not delayed:  # whatever else could be quantized: nothing is by accident
        matchers.append(GlobMatcher("*", UNQUANTIZED_KEY))
    return RecipeConfig(matchers, _config_of_keys(precision))


def paths_in_core(linear: Linear, first: int) -> Iterator[str]:
    """Yield the names that core knows a linear layer by.

    An MTP depth is numbered from 1 while it is built and from 0 ever after
    (multi_token_prediction.py 1735, hybrid_model.py 330). The later name decides what multiplies.

    Args:
        linear: a layer that the chunk holds.
        first: number of the first main layer of the chunk, from 1.
    """
    if not linear.depth:
        yield f"decoder.layers.{linear.layer - first}.{_PLACE_OF[linear.module]}"
        return
    block = f"mtp.layers.{linear.depth - 1}"
    if linear.module == MTP_PROJECTION:
        yield f"{block}.eh_proj"
        return
    place = _PLACE_OF[linear.module.removeprefix(f"{MTP}.")]
    yield f"{block}.mtp_model_layer.layers.{linear.layer - 1}.{place}"


def _config_of_keys(precision: Precision) -> dict[str, dict[str, object]]:
    """Return what each key of a recipe means to core's modules (transformer_engine.py 165).

    Formats come as custom recipes by name, which `patches.for_recipes` turns into objects:
    core's own have no options. Core keeps them apart as FP8 or FP4 and does the same with both.
    """
    configs: dict[str, dict[str, object]] = {UNQUANTIZED_KEY: _config({})}
    for format in (*_FP8, GemmFormat.nvfp4):
        if format is GemmFormat.fp8_delayed:
            continue
        bits = "fp4" if format is GemmFormat.nvfp4 else "fp8"
        recipe: dict[str, object] = {
            f"{bits}_quantization_recipe": "custom",
            "custom_recipe_factory": format.value,
            # The projection of an MTP block stands in no region of FP4 (1185 there).
            "override_nonquantized_autocast": True,
        }
        configs[format.value] = _config(recipe)
        if format in GATHERED_IN_FP8:
            configs[format.value + KEPT] = _config({**recipe, "fp8_param": True})
    return configs


def _config(recipe: dict[str, object]) -> dict[str, object]:
    return {
        "transformer_engine_config_type": "TEQuantizationParams",
        "training_recipe": {"override_quantized_autocast": True, **recipe},
    }
