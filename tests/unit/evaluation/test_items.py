from collections import Counter

import numpy as np
import pytest

from hybrid_train.evaluation.items import ExactTask, Item, dealt, mixed


@pytest.mark.parametrize(
    ("choices", "answer"), [(("a", "b"), "c"), (("a", "a"), "a"), (("a", "b", "b"), "a")]
)
def test_choices_differ_and_one_is_the_answer(choices: tuple[str, ...], answer: str) -> None:
    with pytest.raises(ValueError, match="choices must differ"):
        Item(name="1", prompt="p", answer=answer, choices=choices)


def test_a_written_answer_has_a_length() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        Item(name="1", prompt="p", answer="a")


def test_a_choice_is_right_to_the_letter_a_written_answer_word_by_word() -> None:
    choice = Item(name="1", prompt="p", answer=" a", choices=(" a", " b"))
    written = Item(name="1", prompt="p", answer="a b", max_tokens=9)
    grade = ExactTask().grade
    assert [grade(choice, text) for text in (" a", "a", " b", " a b")] == [1, 0, 0, 0]
    assert [grade(written, text) for text in ("a b", " a\n b ", "ab", "a", "b a")] == [
        1,
        1,
        0,
        0,
        0,
    ]


def test_choices_are_mixed_evenly() -> None:
    random = np.random.default_rng(0)
    places = Counter(mixed("a", "bc", random).index("a") for _ in range(3000))
    assert sorted(mixed("a", "bc", random)) == ["a", "b", "c"]
    assert all(abs(places[place] - 1000) < 110 for place in range(3))  # four standard errors


def test_items_are_dealt_to_groups_in_turn() -> None:
    assert dealt(["a", "b", "c"], 5) == ["a", "b", "c", "a", "b"]
