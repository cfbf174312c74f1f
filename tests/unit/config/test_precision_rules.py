"""Exceptions that name what there is, and formats that go together; paths lead into the list."""

from typing import Any

import pytest

from hybrid_train.config.rules_of_precision import PRECISION_RULES
from hybrid_train.schema.optimizer import AdamW, MomentFormat
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import (
    Gemm,
    GemmFormat,
    NumberFormat,
    Precision,
    PrecisionRule,
)
from hybrid_train.schema.problems import Problem
from tests.tiny import tiny_job

BF16 = GemmFormat.bf16


def problems(*rules: PrecisionRule, format: GemmFormat = GemmFormat.mxfp8) -> list[Problem]:
    job = tiny_job("M-*", precision=Precision(format=format, exceptions=list(rules)))
    return [found for rule in PRECISION_RULES for found in rule(job, 1)]


def test_an_exception_that_speaks_of_some_layers_is_sound() -> None:
    assert problems(PrecisionRule(format=BF16, layers="last 1", modules=["attention"])) == []


def test_a_module_that_no_model_has_is_refused_with_the_nearest_name() -> None:
    (found,) = problems(PrecisionRule(format=BF16, modules=["mamba.outproj"]))
    assert (found.path, found.nearest) == ("precision.exceptions.0.modules", "mamba.out_proj")


def test_an_exception_for_layers_that_this_model_lacks_is_refused() -> None:
    sound = PrecisionRule(format=BF16, modules=["mlp"])
    (found,) = problems(sound, PrecisionRule(format=BF16, modules=["moe"]))
    assert found.path == "precision.exceptions.1"
    assert "matches no linear layer" in found.rule


def test_an_exception_that_earlier_ones_cover_is_refused() -> None:
    gemms = [Gemm.wgrad]
    wide, narrow = PrecisionRule(format=BF16), PrecisionRule(format=BF16, gemms=gemms)
    (found,) = problems(wide, narrow)
    assert found.path == "precision.exceptions.1"
    assert "earlier exceptions" in found.rule
    assert problems(narrow, wide) == []


@pytest.mark.parametrize(
    ("format", "other"),
    [(GemmFormat.fp32, BF16), (GemmFormat.mxfp8, GemmFormat.fp32)],
)
def test_what_is_not_quantized_has_one_format(format: GemmFormat, other: GemmFormat) -> None:
    (found,) = problems(PrecisionRule(format=other), format=format)
    nearest = "fp32" if format is GemmFormat.fp32 else "bf16"
    assert (found.path, found.nearest) == ("precision.exceptions.0.format", nearest)


def gather_problems(**sections: Any) -> list[str]:
    precision = Precision(format=GemmFormat.fp8_tensorwise, fp8_param_gather=True)
    job = tiny_job("M-*", **{"precision": precision, **sections})
    found = [one for rule in PRECISION_RULES for one in rule(job, 1)]
    assert {(one.path, one.nearest) for one in found} <= {("precision.fp8_param_gather", "false")}
    return [one.rule for one in found]


def kept(format: GemmFormat, **options: Any) -> Precision:
    return Precision(format=format, fp8_param_gather=True, **options)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": Parallel(distributed_optimizer=False)}, "distributed_optimizer=true"),
        ({"parallel": Parallel(fsdp=True)}, "fsdp=false"),
        ({"precision": kept(GemmFormat.mxfp8)}, "fp8_tensorwise or fp8_blockwise"),
        ({"precision": kept(BF16)}, "fp8_tensorwise or fp8_blockwise"),
        (
            {"precision": kept(GemmFormat.fp8_blockwise, unquantized=NumberFormat.fp32)},
            "unquantized=bf16",
        ),
        (
            {"optimizer": AdamW(first_moment=MomentFormat.bfloat16)},
            "in reduced precision is first_moment",
        ),
    ],
    ids=str,
)
def test_weights_in_fp8_are_refused_where_megatron_does_not_gather_them(
    sections: dict[str, Any], words: str
) -> None:
    (rule,) = gather_problems(**sections)
    assert words in rule


def test_weights_in_fp8_may_be_those_of_exceptions() -> None:
    assert gather_problems() == []
    exceptions = [PrecisionRule(format=GemmFormat.fp8_blockwise, modules=["mlp"])]
    assert gather_problems(precision=kept(GemmFormat.mxfp8, exceptions=exceptions)) == []
