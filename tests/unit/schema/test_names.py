import pytest

from hybrid_train.schema.names import nearest, nearest_key

KNOWN = ["train.tokens", "train.seed", "data.train", "model.moe.top_k", "model.mtp.depth", "model"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("trian.tokens", "train.tokens"),
        ("tokens", "train.tokens"),
        ("model.top_k", "model.moe.top_k"),
        ("modle", "model"),
        ("model.mpt.depth", "model.mtp.depth"),
        ("xyz", None),
        ("train.size", None),  # most letters of train.seed, and none of its meaning
        ("model.rope", None),
        ("a..b", None),
    ],
)
def test_a_misspelt_key_finds_the_likely_one(written: str, meant: str | None) -> None:
    assert nearest_key(written, KNOWN) == meant


@pytest.mark.parametrize(
    ("written", "meant"), [("quikstart", "quickstart"), ("tinycpu", "tiny_cpu"), ("", None)]
)
def test_a_misspelt_name_finds_the_likely_one(written: str, meant: str | None) -> None:
    assert nearest(written, ["quickstart", "tiny_cpu", "ladder_10m"]) == meant
