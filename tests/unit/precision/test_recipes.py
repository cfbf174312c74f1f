"""What each format means for each operand of each GEMM, against the published recipes."""

import pytest

from hybrid_train.precision.recipes import (
    OPERANDS,
    Element,
    Operand,
    Scale,
    Scheme,
    Shape,
    operands_as_asked,
    schemes,
)
from hybrid_train.schema.precision import (
    Gemm,
    GemmFormat,
    GradientElement,
    Precision,
)

E4M3, E5M2, E2M1 = Element.e4m3, Element.e5m2, Element.e2m1
ROWS, SQUARES = Shape.vector, Shape.square


def operands(format: GemmFormat, gemm: Gemm, **settings: object) -> dict[Operand, Scheme]:
    found = schemes(format, gemm, Precision(format=format, **settings))
    assert found is not None
    return {operand: one for (operand, _), one in zip(OPERANDS[gemm], found, strict=True)}


def test_each_product_sums_over_the_axis_that_its_operands_share() -> None:
    # y[T, O] = x[T, I] w[O, I]; dx[T, I] = dy[T, O] w[O, I]; dw[O, I] = dy[T, O] x[T, I].
    sizes = {Operand.input: "TI", Operand.weight: "OI", Operand.gradient: "TO"}
    summed = {Gemm.fprop: "I", Gemm.dgrad: "O", Gemm.wgrad: "T"}
    for gemm, pair in OPERANDS.items():
        assert [sizes[operand][axis] for operand, axis in pair] == [summed[gemm]] * 2


@pytest.mark.parametrize("format", [GemmFormat.fp32, GemmFormat.bf16])
def test_plain_formats_are_not_quantized(format: GemmFormat) -> None:
    for gemm in Gemm:
        assert schemes(format, gemm, Precision(format=format)) is None
        name = {"fp32": "float32", "bf16": "bfloat16"}[format.value]
        assert operands_as_asked(format, gemm, Precision(format=format)) == (name, name)


@pytest.mark.parametrize("format", [GemmFormat.fp8_tensorwise, GemmFormat.fp8_delayed])
@pytest.mark.parametrize("gemm", Gemm)
def test_one_scale_a_tensor_is_hybrid_fp8(format: GemmFormat, gemm: Gemm) -> None:
    # Nemotron-H, arXiv:2504.03624, section 2.4: E4M3 for weights and activations, E5M2 for
    # gradients, one scale a tensor.
    expected = {
        Operand.input: Scheme(E4M3, Scale.fp32, Shape.tensor),
        Operand.weight: Scheme(E4M3, Scale.fp32, Shape.tensor),
        Operand.gradient: Scheme(E5M2, Scale.fp32, Shape.tensor),
    }
    for operand, scheme in operands(format, gemm).items():
        assert scheme == expected[operand]


@pytest.mark.parametrize("gemm", Gemm)
def test_blockwise_fp8_is_that_of_deepseek_with_powers_of_two(gemm: Gemm) -> None:
    # arXiv:2412.19437, section 3.3.2: E4M3 for all, weights 128 x 128, the rest 1 x 128;
    # Transformer Engine's Float8BlockScaling makes the scales powers of two.
    for operand, scheme in operands(GemmFormat.fp8_blockwise, gemm).items():
        shape = SQUARES if operand is Operand.weight else ROWS
        assert scheme == Scheme(E4M3, Scale.power_of_two, shape, 128)


@pytest.mark.parametrize("gemm", Gemm)
def test_mxfp8_has_32_neighbours_for_every_operand(gemm: Gemm) -> None:
    for scheme in operands(GemmFormat.mxfp8, gemm).values():
        assert scheme == Scheme(E4M3, Scale.e8m0, ROWS, 32)


@pytest.mark.parametrize("gemm", Gemm)
def test_nvfp4_is_the_published_pretraining_recipe(gemm: Gemm) -> None:
    # arXiv:2509.25149, section 4: weights 16 x 16, the rest 1 x 16; the transform on both operands
    # of wgrad and nowhere else; gradients alone are rounded stochastically.
    rotated = gemm is Gemm.wgrad
    expected = {
        Operand.input: Scheme(E2M1, Scale.e4m3, ROWS, 16, hadamard=rotated),
        Operand.weight: Scheme(E2M1, Scale.e4m3, SQUARES, 16),
        Operand.gradient: Scheme(E2M1, Scale.e4m3, ROWS, 16, stochastic=True, hadamard=rotated),
    }
    for operand, scheme in operands(GemmFormat.nvfp4, gemm).items():
        assert scheme == expected[operand]


@pytest.mark.parametrize("gemm", Gemm)
def test_mxfp4_has_rows_of_32_and_the_rest_of_the_recipe(gemm: Gemm) -> None:
    rotated = gemm is Gemm.wgrad
    for operand, scheme in operands(GemmFormat.mxfp4, gemm).items():
        stochastic = operand is Operand.gradient
        expected = Scheme(E2M1, Scale.e8m0, ROWS, 32, stochastic=stochastic, hadamard=rotated)
        assert scheme == expected


def test_each_part_of_the_nvfp4_recipe_can_be_taken_away() -> None:
    plain = {"hadamard": False, "stochastic_rounding": False, "square_weight_blocks": False}
    for gemm in Gemm:
        for scheme in operands(GemmFormat.nvfp4, gemm, **plain).values():
            assert scheme == Scheme(E2M1, Scale.e4m3, ROWS, 16)


@pytest.mark.parametrize("element", GradientElement)
def test_the_element_of_gradients_can_be_chosen(element: GradientElement) -> None:
    fp8 = [GemmFormat.fp8_tensorwise, GemmFormat.fp8_blockwise, GemmFormat.mxfp8]
    for format in fp8:
        found = operands(format, Gemm.dgrad, gradient_element=element)
        assert found[Operand.gradient].element.value == element.value
        assert found[Operand.weight].element is E4M3


@pytest.mark.parametrize("powers", [False, True])
def test_float_scales_can_be_powers_of_two_or_not(powers: bool) -> None:
    expected = Scale.power_of_two if powers else Scale.fp32
    for format in (GemmFormat.fp8_tensorwise, GemmFormat.fp8_blockwise):
        for gemm in Gemm:
            for scheme in operands(format, gemm, power_of_two_scales=powers).values():
                assert scheme.scale is expected


def test_the_words_of_an_audit_name_all_that_differs() -> None:
    found = operands_as_asked(GemmFormat.nvfp4, Gemm.wgrad, Precision(format=GemmFormat.nvfp4))
    assert found == (
        "e2m1, 1x16, e4m3 scales, rotated, stochastic",
        "e2m1, 1x16, e4m3 scales, rotated",
    )
