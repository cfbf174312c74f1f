import pytest

from hybrid_train.config.names import nearest

KNOWN = ["train.tokens", "train.seed", "data.train", "model.moe.top_k", "model"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("trian.tokens", "train.tokens"),
        ("tokens", "train.tokens"),
        ("model.top_k", "model.moe.top_k"),
        ("modle", "model"),
        ("xyz", None),
    ],
)
def test_a_misspelt_name_finds_the_likely_one(written: str, meant: str | None) -> None:
    assert nearest(written, KNOWN) == meant
