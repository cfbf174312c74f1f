"""Numbers as people write them."""

import pytest

from hybrid_train.schema.units import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "step", "0 steps"),
        (1, "step", "1 step"),
        (1124, "step", "1,124 steps"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (3, "prefix", "3 prefixes"),
        (2, "batch", "2 batches"),
        (2, "history", "2 histories"),
        (2, "key", "2 keys"),
        (2, "data-parallel rank", "2 data-parallel ranks"),
    ],
)
def test_a_noun_is_of_the_number_of_what_it_counts(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text
