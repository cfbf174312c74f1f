"""Exceptions that name what there is, and formats that go together; paths lead into the list."""

import pytest

from hybrid_train.config.check_precision import PRECISION_RULES
from hybrid_train.config.problems import Problem
from hybrid_train.config.schema.precision import Precision, PrecisionRule, Product, ProductFormat
from tests.tiny import tiny_job

BF16 = ProductFormat.bf16


def problems(*rules: PrecisionRule, format: ProductFormat = ProductFormat.mxfp8) -> list[Problem]:
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
    products = [Product.wgrad]
    wide, narrow = PrecisionRule(format=BF16), PrecisionRule(format=BF16, products=products)
    (found,) = problems(wide, narrow)
    assert found.path == "precision.exceptions.1"
    assert "earlier exceptions" in found.rule
    assert problems(narrow, wide) == []


@pytest.mark.parametrize(
    ("format", "other"),
    [(ProductFormat.fp32, BF16), (ProductFormat.mxfp8, ProductFormat.fp32)],
)
def test_what_is_not_quantized_has_one_format(format: ProductFormat, other: ProductFormat) -> None:
    (found,) = problems(PrecisionRule(format=other), format=format)
    nearest = "fp32" if format is ProductFormat.fp32 else "bf16"
    assert (found.path, found.nearest) == ("precision.exceptions.0.format", nearest)
