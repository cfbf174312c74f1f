"""A cut as data: what is asked together, and what contradicts itself."""

import pytest

from hybrid_train.schema.model import AttentionSizes, MlpSizes
from hybrid_train.schema.problems import collect
from hybrid_train.schema.pruning import Cut, CutMoe, CutSizes, Depth, MtpBlocks


def test_a_size_is_given_by_the_name_that_it_has_in_the_model() -> None:
    sizes = CutSizes(hidden_size=24, mlp=MlpSizes(intermediate_size=40), moe=CutMoe(latent_size=8))
    assert sizes.given == {
        "hidden_size": 24, "mlp.intermediate_size": 40, "moe.latent_size": 8
    }  # fmt: skip
    assert not CutSizes().given


@pytest.mark.parametrize(
    ("cut", "paths"),
    [
        (Cut(), ["share"]),
        (Cut(share=0.5), []),
        (Cut(budget="4.5B"), []),
        (Cut(mtp=MtpBlocks.drop), []),
        (Cut(depth=Depth(attention=0)), []),
        (Cut(share=0.5, budget="1M"), ["budget"]),
        (Cut(share=1.5), ["share"]),
        (Cut(budget="many"), ["budget"]),
        (Cut(share=0.5, shrink=["mlp.intermediate_sizes"]), ["shrink.0"]),
        (Cut(share=0.5, shrink=[]), ["shrink"]),
        (Cut(share=0.5, shrink=["attention.heads", "attention.kv_heads"]), ["shrink"]),
        (
            Cut(
                share=0.5,
                shrink=["attention.kv_heads"],
                model=CutSizes(attention=AttentionSizes(heads=8)),
            ),
            ["model.attention.heads"],
        ),
        (Cut(depth=Depth(drop=["1"], keep=["2"])), ["depth.keep"]),
        (Cut(depth=Depth(block=2, mamba=3)), ["depth.layers"]),
        (Cut(depth=Depth(layers=3, mamba=3, moe=2)), ["depth.layers"]),
        (Cut(depth=Depth(drop=["odd ones"])), ["depth.drop.0"]),
        (Cut(depth=Depth(together=2, layers=3)), []),
        (Cut(depth=Depth(together=2, mlp=3)), ["depth.together"]),
        (Cut(depth=Depth(together=2)), ["share"]),
    ],
)
def test_what_contradicts_itself_is_told_where_it_stands(cut: Cut, paths: list[str]) -> None:
    assert [problem.path for problem in collect(cut)] == paths


def test_a_misspelt_size_gets_the_one_that_is_meant() -> None:
    (problem,) = collect(Cut(share=0.5, shrink=["mlp.intermediate_sizes"]))
    assert problem.nearest == "mlp.intermediate_size"
