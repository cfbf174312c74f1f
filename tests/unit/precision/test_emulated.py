"""A linear layer with quantized operands computes, and learns from, what its recipe says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.gemm_formats import Formats, Linear
from hybrid_train.precision.audit import Records
from hybrid_train.precision.emulated import (
    Emulation,
    emulation_of,
    quantized_grouped_linear,
    quantized_linear,
)
from hybrid_train.precision.formats import Noise
from hybrid_train.precision.quantize import quantize
from hybrid_train.precision.recipes import (
    OPERANDS,
    Operand,
    schemes,
)
from hybrid_train.schema.precision import Gemm, GemmFormat, Precision

LAYER = Linear(0, 1, "mamba.in_proj")
QUANTIZED = [one for one in GemmFormat if one not in (GemmFormat.fp32, GemmFormat.bf16)]


def formats(**by_gemm: GemmFormat) -> Formats:
    return Formats({gemm: by_gemm[gemm.value] for gemm in Gemm}, dict.fromkeys(Gemm))


def everywhere(format: GemmFormat) -> Formats:
    return formats(fprop=format, dgrad=format, wgrad=format)


def emulation(format: GemmFormat, precision: Precision | None = None) -> Emulation:
    return emulation_of(LAYER, everywhere(format), precision or Precision(format=format), Records())


def problem(tokens: int = 48, inputs: int = 64, outputs: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output, with outliers; 40 is no multiple of a block."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, inputs, generator=generator)
    x[:, 3] *= 20
    weight = torch.randn(outputs, inputs, generator=generator) / 8
    return x, weight, torch.randn(tokens, outputs, generator=generator) ** 3


def expected(format: GemmFormat, precision: Precision) -> dict[Gemm, Tensor]:
    """The three GEMMs in float64, of operands quantized by the readable reference."""
    x, weight, grad = problem()
    raw = {Operand.input: x, Operand.weight: weight, Operand.gradient: grad}
    noise = Noise()
    noise.start_step(1, 2, 3)

    def operands(gemm: Gemm) -> list[Tensor]:
        found = schemes(format, gemm, precision)
        assert found is not None
        return [
            quantize(
                raw[operand], scheme, axis, noise=noise.draw(grad) if scheme.stochastic else None
            )
            .dequantize()
            .double()
            for (operand, axis), scheme in zip(OPERANDS[gemm], found, strict=True)
        ]

    by_gemm = {gemm: operands(gemm) for gemm in Gemm}
    left, right = by_gemm[Gemm.fprop]
    grad_left, grad_right = by_gemm[Gemm.dgrad]
    rows, tokens = by_gemm[Gemm.wgrad]
    return {
        Gemm.fprop: left @ right.T,
        Gemm.dgrad: grad_left @ grad_right,
        Gemm.wgrad: rows.T @ tokens,
    }


def computed(how: Emulation, buffer: Tensor | None = None) -> dict[Gemm, Tensor]:
    x, weight, grad = problem()
    x.requires_grad_()
    weight.requires_grad_()
    how.records.noise.start_step(1, 2, 3)
    y = quantized_linear(x, weight, how, buffer)
    y.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    return {Gemm.fprop: y.detach(), Gemm.dgrad: x.grad, Gemm.wgrad: weight.grad}


@pytest.mark.parametrize("format", QUANTIZED)
def test_each_product_multiplies_the_operands_of_the_recipe(format: GemmFormat) -> None:
    precision = Precision(format=format)
    found = computed(emulation(format, precision))
    for gemm, value in expected(format, precision).items():
        # Sums of at most 64 products in float32 instead of float64, as torch compares float32.
        torch.testing.assert_close(found[gemm].double(), value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", QUANTIZED)
def test_the_gradient_is_not_that_of_an_ideal_layer(format: GemmFormat) -> None:
    x, weight, grad = problem()
    found = computed(emulation(format))
    for gemm, ideal in ((Gemm.dgrad, grad @ weight), (Gemm.wgrad, grad.T @ x)):
        error = (found[gemm] - ideal).norm() / ideal.norm()
        assert 0.005 < error < 0.5  # an eighth of a binade with E5M2; more in four bits


def test_a_product_that_is_an_exception_multiplies_what_comes() -> None:
    chosen = formats(fprop=GemmFormat.fp32, dgrad=GemmFormat.mxfp8, wgrad=GemmFormat.fp32)
    found = computed(emulation_of(LAYER, chosen, Precision(), Records()))
    x, weight, grad = problem()
    torch.testing.assert_close(found[Gemm.fprop], x @ weight.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[Gemm.wgrad], grad.T @ x, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(found[Gemm.dgrad], grad @ weight, rtol=1e-3)


@pytest.mark.parametrize("format", [GemmFormat.fp8_tensorwise, GemmFormat.nvfp4])
def test_a_gradient_buffer_takes_the_gradient_on_top_of_what_it_has(format: GemmFormat) -> None:
    alone = computed(emulation(format))[Gemm.wgrad]
    buffer = torch.full_like(alone, 2.0)
    computed(emulation(format), buffer)
    torch.testing.assert_close(buffer, alone + 2)


def test_bfloat16_layers_give_bfloat16_and_sum_in_float32() -> None:
    x, weight, _ = (part.bfloat16() for part in problem())
    y = quantized_linear(x, weight, emulation(GemmFormat.mxfp8))
    assert y.dtype == torch.bfloat16
    precise = quantized_linear(x.float(), weight.float(), emulation(GemmFormat.mxfp8))
    assert torch.equal(y, precise.bfloat16())


def test_leading_axes_are_tokens() -> None:
    x, weight, _ = problem()
    how = emulation(GemmFormat.fp8_blockwise)
    y = quantized_linear(x.view(6, 8, -1), weight, how)
    assert torch.equal(y.view(48, -1), quantized_linear(x, weight, how))


def test_every_expert_is_quantized_by_itself() -> None:
    x, weight, grad = problem()
    weights = [weight.clone().requires_grad_(), (100 * weight).requires_grad_(), weight.clone()]
    how = [emulation(GemmFormat.fp8_tensorwise) for _ in weights]
    counts = [20, 28, 0]
    x.requires_grad_()
    y = quantized_grouped_linear(x, weights, counts, how)
    y.backward(grad)
    for expert, rows in enumerate(zip(x.split(counts), grad.split(counts), strict=True)):
        own = weights[expert].detach().requires_grad_()
        alone = quantized_linear(rows[0].detach(), own, how[expert])
        assert torch.equal(y.split(counts)[expert], alone)
        if rows[0].numel():
            alone.backward(rows[1])
            assert torch.equal(weights[expert].grad, own.grad)  # type: ignore[arg-type]


def test_an_expert_without_tokens_has_a_gradient_of_zeros() -> None:
    _, weight, _ = problem()
    weight.requires_grad_()
    quantized_linear(torch.empty(0, 64), weight, emulation(GemmFormat.nvfp4)).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]


def test_the_same_step_rounds_stochastically_in_the_same_way() -> None:
    first, again = (computed(emulation(GemmFormat.nvfp4)) for _ in range(2))
    assert all(torch.equal(first[gemm], again[gemm]) for gemm in Gemm)


def test_delayed_scaling_takes_the_largest_value_of_earlier_steps() -> None:
    x, weight, _ = problem()
    how = emulation(GemmFormat.fp8_delayed)
    quantized_linear(x, weight, how)
    history = how.histories[Operand.input]
    history.roll(history.seen)
    larger = quantized_linear(4 * x, weight, how)
    largest = x.abs().max()
    # The scale knows nothing of the new largest values: they are cut where the old ones end.
    cut = quantized_linear((4 * x).clamp(-largest, largest), weight, how)
    torch.testing.assert_close(larger, cut)


@pytest.mark.parametrize(
    "change", [lambda how: how, lambda how: quantized_linear(*problem()[:2], how)]
)
def test_nothing_is_noted_unless_somebody_listens(change: Callable[[Emulation], object]) -> None:
    how = emulation(GemmFormat.mxfp8)
    change(how)
    how.records.audit.start()
    assert how.records.audit.stop() == {}


def test_the_audit_hears_what_is_multiplied() -> None:
    how = emulation(GemmFormat.nvfp4)
    how.records.audit.start()
    computed(how)
    seen = how.records.audit.stop()
    assert set(seen) == {(LAYER, gemm) for gemm in Gemm}
    assert seen[LAYER, Gemm.wgrad] == {
        (
            "e2m1, 1x16, e4m3 scales, rotated, stochastic",
            "e2m1, 1x16, e4m3 scales, rotated",
        )
    }


def test_statistics_know_every_operand_of_every_product() -> None:
    how = emulation(GemmFormat.mxfp8)
    how.records.statistics.start()
    computed(how)
    counted = how.records.statistics.stop()
    assert {(gemm, operand) for _, gemm, operand in counted} == {
        (gemm, operand) for gemm, pair in OPERANDS.items() for operand, _ in pair
    }
    assert counted[LAYER, Gemm.fprop, Operand.input].values == 48 * 64
