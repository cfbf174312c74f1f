"""Layers in words."""

import pytest

from hybrid_train.schema.layer_ranges import is_range, layers_of


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("first 2", [1, 2]),
        (" last 3 ", [8, 9, 10]),
        ("last 15%", [9, 10]),
        ("first 0.1%", [1]),
        ("last 100%", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("first 12", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("7", [7]),
        ("3-5", [3, 4, 5]),
        ("9 - 12", [9, 10]),
        ("11", []),
        ("first 0", []),
    ],
)
def test_words_name_layers_of_ten(text: str, layers: list[int]) -> None:
    assert list(layers_of(text, 10)) == layers


def test_the_last_15_percent_of_super_are_its_last_14_layers() -> None:
    # the published configuration keeps 14 of 88 layers (Megatron-Bridge, nemotron_3_super.py)
    assert list(layers_of("last 15%", 88)) == list(range(75, 89))


HUGE = "9" * 5000


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "0", "last", "last 1.5", "5-3", "first -1", "1,2", "0-3", "last 5 %%"),
        *("last nan%", "inf", f"first {HUGE}", f"last {HUGE}%", HUGE, f"3-{HUGE}"),
    ],
    ids=lambda text: text[:12],
)
def test_other_words_are_refused(text: str) -> None:
    assert not is_range(text)
    with pytest.raises(ValueError, match="must read"):
        layers_of(text, 10)
