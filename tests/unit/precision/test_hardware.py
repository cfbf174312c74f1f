"""Which GPU has which format: the documented table, asked without a GPU."""

import pytest

from hybrid_train.precision.te import (
    Gpu,
    is_native,
    nearest_native,
    require_formats_on,
    require_native,
)
from hybrid_train.schema.precision import GemmFormat, Precision, PrecisionRule
from hybrid_train.schema.problems import UserError
from tests.tiny import tiny_job

F = GemmFormat
A100 = Gpu("A100", (8, 0), (13, 0))
L40 = Gpu("L40", (8, 9), (12, 8))
H100_OLD = Gpu("H100", (9, 0), (12, 8))
H100 = Gpu("H100", (9, 0), (13, 0))
B200 = Gpu("B200", (10, 0), (13, 0))
RTX = Gpu("RTX PRO 6000", (12, 0), (13, 0))
PLAIN, TENSOR = {F.fp32, F.bf16}, {F.fp8_tensorwise, F.fp8_delayed}

TABLE = [
    (Gpu("V100", (7, 0), (12, 8)), {F.fp32}),
    (A100, PLAIN),
    (Gpu("L40", (8, 9), (12, 0)), PLAIN),
    (L40, PLAIN | TENSOR),
    (H100_OLD, PLAIN | TENSOR),
    (H100, PLAIN | TENSOR | {F.fp8_blockwise}),
    (B200, PLAIN | TENSOR | {F.fp8_blockwise, F.mxfp8, F.nvfp4}),
    (RTX, PLAIN | TENSOR | {F.fp8_blockwise, F.nvfp4}),
]


@pytest.mark.parametrize(("gpu", "formats"), TABLE, ids=lambda one: getattr(one, "name", ""))
def test_a_gpu_has_the_formats_of_its_generation(gpu: Gpu, formats: set[GemmFormat]) -> None:
    assert {format for format in GemmFormat if is_native(format, gpu)} == formats


NEAREST = [
    (F.nvfp4, B200, F.nvfp4),
    (F.nvfp4, H100, F.fp8_blockwise),
    (F.nvfp4, H100_OLD, F.fp8_tensorwise),
    (F.nvfp4, A100, F.bf16),
    (F.mxfp8, RTX, F.fp8_blockwise),
    (F.mxfp4, B200, F.nvfp4),
    (F.fp8_blockwise, L40, F.fp8_tensorwise),
    (F.fp8_delayed, A100, F.bf16),
    (F.bf16, Gpu("V100", (7, 0), (12, 8)), F.fp32),
]


@pytest.mark.parametrize(("format", "gpu", "nearest"), NEAREST)
def test_the_nearest_format_is_one_that_the_gpu_has(
    format: GemmFormat, gpu: Gpu, nearest: GemmFormat
) -> None:
    assert nearest_native(format, gpu) is nearest


def test_what_a_gpu_lacks_is_named_with_what_is_nearest() -> None:
    with pytest.raises(UserError) as error:
        require_native([F.nvfp4, F.bf16, F.mxfp8, F.nvfp4], H100)
    text = str(error.value)
    assert "H100 (compute capability 9.0, CUDA 13.0)" in text
    assert text.count("nvfp4, nearest: fp8_blockwise") == 1
    assert "mxfp8, nearest: fp8_blockwise" in text
    assert "precision.backend=emulated" in text


def test_formats_of_exceptions_are_asked_for_too() -> None:
    rule = PrecisionRule(format=F.mxfp8, modules=["mlp"])
    job = tiny_job("M-", precision=Precision(format=F.fp8_tensorwise, exceptions=[rule]))
    require_formats_on(job, B200)
    with pytest.raises(UserError, match="mxfp8"):
        require_formats_on(job, H100)
    job.model.pattern = "M"  # without the layer that the exception means
    require_formats_on(job, H100)


def test_float32_scales_of_blocks_are_refused_where_products_take_powers_of_two() -> None:
    job = tiny_job("M", precision=Precision(format=F.fp8_blockwise, power_of_two_scales=False))
    require_formats_on(job, H100)
    with pytest.raises(UserError, match="power_of_two_scales"):
        require_formats_on(job, B200)
    job.precision.power_of_two_scales = None
    require_formats_on(job, B200)
