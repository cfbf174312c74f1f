"""Our precision section as Transformer Engine's recipe objects; its recipes are plain Python."""

from typing import Any

import pytest

from hybrid_train.planning.gpu_formats import Gpu
from hybrid_train.precision import te
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Shape,
    schemes,
)
from hybrid_train.schema.precision import (
    AmaxChoice,
    Gemm,
    GemmFormat,
    GradientElement,
    Precision,
    PrecisionRule,
)
from hybrid_train.schema.problems import ConfigError
from tests.tiny import tiny_job

F = GemmFormat
FORMATS = [F.fp8_tensorwise, F.fp8_delayed, F.fp8_blockwise, F.mxfp8, F.nvfp4]


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("transformer_engine.common.recipe")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gradients", [None, GradientElement.e4m3, GradientElement.e5m2])
@pytest.mark.parametrize("power", [None, True, False])
def test_a_recipe_has_the_elements_and_scales_of_the_emulated_one(
    library: Any, format: GemmFormat, gradients: GradientElement | None, power: bool | None
) -> None:
    if format is F.nvfp4 or (format is F.fp8_delayed and power):
        pytest.skip("has no such option; the checks say so")
    precision = Precision(format=format, gradient_element=gradients, power_of_two_scales=power)
    made = te.recipe(format, precision)
    found = schemes(format, Gemm.dgrad, precision)
    assert found is not None
    hybrid = found[0].element is Element.e5m2
    assert made.fp8_format is (library.Format.HYBRID if hybrid else library.Format.E4M3)
    for operand in ("fwd_inp", "fwd_weight", "bwd_grad"):
        options = getattr(made, f"fp8_quant_{operand}", None)
        if options is not None:
            assert options.power_2_scale == (found[0].scale is Scale.power_of_two)
    assert made.backward_override is None
    assert not made.fp8_dpa
    assert not made.fp8_mha


def test_blockwise_has_squares_for_weights_alone(library: Any) -> None:
    made = te.recipe(F.fp8_blockwise, Precision(format=F.fp8_blockwise))
    dims = (made.x_block_scaling_dim, made.w_block_scaling_dim, made.grad_block_scaling_dim)
    assert dims == (1, 2, 1)


def test_delayed_scaling_has_our_history(library: Any) -> None:
    precision = Precision(format=F.fp8_delayed, amax_history=5, amax_choice=AmaxChoice.most_recent)
    made = te.recipe(F.fp8_delayed, precision)
    assert (made.amax_history_len, made.amax_compute_algo, made.margin) == (5, "most_recent", 0)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("square", [False, True])
def test_nvfp4_has_every_switch(
    library: Any, hadamard: bool, stochastic: bool, square: bool
) -> None:
    precision = Precision(
        format=F.nvfp4,
        hadamard=hadamard,
        stochastic_rounding=stochastic,
        square_weight_blocks=square,
    )
    made = te.recipe(F.nvfp4, precision)
    operands = {
        Gemm.dgrad: (made.fp4_quant_bwd_grad, made.fp4_quant_fwd_weight),
        Gemm.wgrad: (made.fp4_quant_bwd_grad, made.fp4_quant_fwd_inp),
    }
    for gemm, pair in operands.items():
        found = schemes(F.nvfp4, gemm, precision)
        assert found is not None
        for options, scheme in zip(pair, found, strict=True):
            assert options.stochastic_rounding == scheme.stochastic
            assert options.fp4_2d_quantization == (scheme.shape is Shape.square)
            if gemm is Gemm.wgrad:
                assert options.random_hadamard_transform == scheme.hadamard
    assert made.nvfp4_4over6 == "none"


def test_the_environment_changes_nothing(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read when the library is imported: so this asks the objects made from another default."""
    monkeypatch.setattr(library.Float8CurrentScaling, "use_power_2_scales", True)
    for name in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        changed = library.QParams(power_2_scale=True)
        monkeypatch.setattr(library.Float8CurrentScaling, name, changed)
    made = te.recipe(F.fp8_tensorwise, Precision(format=F.fp8_tensorwise))
    assert not made.fp8_quant_fwd_inp.power_2_scale


@pytest.mark.parametrize(
    ("format", "gradients", "name"),
    [
        (F.fp8_tensorwise, None, "hybrid"),
        (F.fp8_delayed, None, "hybrid"),
        (F.fp8_blockwise, None, "e4m3"),
        (F.mxfp8, None, "e4m3"),
        (F.mxfp8, GradientElement.e5m2, "hybrid"),
        (F.fp8_tensorwise, GradientElement.e4m3, "e4m3"),
    ],
)
def test_core_is_told_the_elements(
    format: GemmFormat, gradients: GradientElement | None, name: str
) -> None:
    assert te.fp8_format(format, Precision(format=format, gradient_element=gradients)) == name


def test_a_run_is_refused_by_the_gpu_that_is_there_with_what_is_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = PrecisionRule(format=F.mxfp8, modules=["mlp"])
    job = tiny_job("M-", precision=Precision(format=F.nvfp4, exceptions=[rule]))
    monkeypatch.setattr(te, "present_gpu", lambda: Gpu("B200", (10, 0), (12, 8)))
    te.require_formats(job)
    monkeypatch.setattr(te, "present_gpu", lambda: Gpu("H100", (9, 0), (12, 8)))
    with pytest.raises(ConfigError) as error:
        te.require_formats(job)
    text = str(error.value)
    assert "precision.format = nvfp4: H100 (compute capability 9.0, CUDA 12.8)" in text
    # blocks need a newer CUDA than this machine has
    assert [one.nearest for one in error.value.problems] == ["fp8_tensorwise", "fp8_tensorwise"]
