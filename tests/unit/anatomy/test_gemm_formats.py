"""Exceptions decide the format of each product."""

import pytest

from hybrid_train.anatomy.gemm_formats import (
    Linear,
    formats_of,
    linears,
    table_lines,
)
from hybrid_train.config.compose import compose
from hybrid_train.config.rules_of_precision import exceptions_match_something
from hybrid_train.schema.model import Model, Moe, Mtp
from hybrid_train.schema.precision import (
    Gemm,
    GemmFormat,
    Precision,
    PrecisionRule,
)
from hybrid_train.schema.train import TrainJob

BF16, FP8, FP4 = GemmFormat.bf16, GemmFormat.mxfp8, GemmFormat.nvfp4
MODEL = Model(pattern="ME*-|M/*E/*E", moe=Moe(latent_size=8, shared_intermediate_size=8), mtp=Mtp())


def job(*rules: PrecisionRule, format: GemmFormat = FP4) -> TrainJob:
    return TrainJob(model=MODEL, precision=Precision(format=format, exceptions=list(rules)))


def formats(*rules: PrecisionRule) -> dict[str, str]:
    """Module at its place -> format, or formats of fprop, dgrad and wgrad."""
    found = formats_of(MODEL, job(*rules).precision)
    return {
        str(linear): "/".join(dict.fromkeys(one.value for one in chosen.formats.values()))
        for linear, chosen in found.items()
    }


def test_every_layer_kind_has_its_linear_layers() -> None:
    assert [str(one) for one in linears(MODEL)] == [
        "1 mamba.in_proj",
        "1 mamba.out_proj",
        "2 moe.latent.down",
        "2 moe.experts.fc1",
        "2 moe.experts.fc2",
        "2 moe.latent.up",
        "2 moe.shared.fc1",
        "2 moe.shared.fc2",
        "3 attention.qkv",
        "3 attention.proj",
        "4 mlp.fc1",
        "4 mlp.fc2",
        "5 mamba.in_proj",
        "5 mamba.out_proj",
        "mtp 1.0 mtp.eh_proj",
        "mtp 1.1 mtp.attention.qkv",
        "mtp 1.1 mtp.attention.proj",
        "mtp 1.2 mtp.moe.latent.down",
        "mtp 1.2 mtp.moe.experts.fc1",
        "mtp 1.2 mtp.moe.experts.fc2",
        "mtp 1.2 mtp.moe.latent.up",
        "mtp 1.2 mtp.moe.shared.fc1",
        "mtp 1.2 mtp.moe.shared.fc2",
    ]


def test_mtp_blocks_of_their_own_are_told_apart() -> None:
    model = Model(pattern="M/*/*", mtp=Mtp(repeated_block=False))
    assert {one.depth for one in linears(model)} == {0, 1, 2}


def test_without_exceptions_every_product_has_the_format_of_the_run() -> None:
    assert set(formats().values()) == {"nvfp4"}


def test_the_first_rule_that_matches_decides() -> None:
    found = formats(
        PrecisionRule(layers="last 1", format=BF16),
        PrecisionRule(modules=["mamba"], format=FP8),
        PrecisionRule(modules=["mamba.in_proj"], format=BF16),
    )
    assert found["5 mamba.in_proj"] == "bf16"
    assert found["1 mamba.in_proj"] == "mxfp8"
    assert found["1 mamba.out_proj"] == "mxfp8"
    assert found["3 attention.qkv"] == "nvfp4"


def test_ranges_of_layers_do_not_reach_into_mtp() -> None:
    found = formats(PrecisionRule(layers="1-5", format=BF16))
    assert {value for name, value in found.items() if name.startswith("mtp")} == {"nvfp4"}
    assert {value for name, value in found.items() if not name.startswith("mtp")} == {"bf16"}


@pytest.mark.parametrize(
    ("module", "named"),
    [
        ("mtp", {"mtp 1.0 mtp.eh_proj", "mtp 1.1 mtp.attention.qkv", "mtp 1.2 mtp.moe.latent.up"}),
        ("attention", {"3 attention.qkv", "3 attention.proj", "mtp 1.1 mtp.attention.qkv"}),
        ("mtp.attention", {"mtp 1.1 mtp.attention.qkv"}),
        ("*.fc2", {"4 mlp.fc2", "2 moe.shared.fc2", "mtp 1.2 mtp.moe.experts.fc2"}),
    ],
)
def test_a_name_means_a_module_its_parts_and_globs(module: str, named: set[str]) -> None:
    found = formats(PrecisionRule(modules=[module], format=BF16))
    assert {name for name, value in found.items() if value == "bf16"} >= named
    assert found["1 mamba.in_proj"] == "nvfp4"


def test_products_are_decided_one_by_one() -> None:
    rules = [
        PrecisionRule(gemms=[Gemm.fprop], format=BF16),
        PrecisionRule(gemms=[Gemm.fprop, Gemm.wgrad], format=FP8),
    ]
    found = formats_of(MODEL, job(*rules).precision)[Linear(0, 1, "mamba.in_proj")]
    assert found.formats == {Gemm.fprop: BF16, Gemm.dgrad: FP4, Gemm.wgrad: FP8}
    assert found.rules == {Gemm.fprop: 0, Gemm.dgrad: None, Gemm.wgrad: 1}


def test_a_kind_that_this_model_lacks_may_stand_beside_one_that_it_has() -> None:
    dense = TrainJob(
        model=Model(pattern="M*"),
        precision=Precision(
            format=FP4, exceptions=[PrecisionRule(modules=["attention", "mtp"], format=BF16)]
        ),
    )
    assert list(exceptions_match_something(dense, 1)) == []


def test_the_table_counts_layers_by_format_and_reason() -> None:
    rules = [PrecisionRule(layers="last 1", format=BF16)]
    text = "\n".join(table_lines(formats_of(MODEL, job(*rules).precision), rules))
    assert "mamba.in_proj        nvfp4   1, 1\n" in text
    assert "mamba.in_proj        bf16    1, 5    exception 0: layers last 1" in text


def test_super_keeps_the_published_layers_out_of_nvfp4() -> None:
    job = compose("check", ["experiment=nemotron3_super", "processes=1024"])
    found = formats_of(job.model, job.precision)
    in_bf16 = [one for one, chosen in found.items() if chosen.formats[Gemm.fprop] is BF16]
    assert all(one.layer >= 75 for one in in_bf16 if "mamba" in one.module)
    fp8 = {one.module for one, chosen in found.items() if chosen.formats[Gemm.fprop] is FP8}
    assert fp8 == {"mamba.out_proj"}
    fp4 = {one.module for one, chosen in found.items() if chosen.formats[Gemm.fprop] is FP4}
    assert fp4 == {
        "mamba.in_proj", "moe.experts.fc1", "moe.experts.fc2", "moe.shared.fc1", "moe.shared.fc2",
    }  # fmt: skip
