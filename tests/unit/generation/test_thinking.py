"""The thinking budget: when the end of thinking is forced, and when it is left alone."""

from typing import TYPE_CHECKING

import pytest

from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.generation.thinking import Budget, ThinkingWatcher, blanks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

SPECIAL = ("</s>", "<think>", "</think>")
OPENED, CLOSED = SPECIAL[1:]


@pytest.fixture(scope="module", params=[SPECIAL, SPECIAL[:1]], ids=["tokens", "letters"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A token per byte; the markers are tokens of their own, or nothing but letters."""
    return train_byte_level_bpe(["a"], vocab_size=257, special_tokens=request.param)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_prompt(text, begin=False, special=True)


def answered(
    tokenizer: Tokenizer, wants: str, *, tokens: int, grace: int, end: str = "\n</think>\n\n",
    prompt: str = "<think>\n",
) -> str:  # fmt: skip
    """What an answer becomes whose model would write a text, letter by letter, but for what is
    forced; as long as the text."""
    budget = Budget(
        tokens=tokens, grace=grace, opened=OPENED, closed=CLOSED, end=encode(tokenizer, end)
    )
    watcher = ThinkingWatcher(
        tokenizer, budget, blanks_of(tokenizer, encode(tokenizer, prompt), OPENED)
    )
    written: list[int] = []
    for own in encode(tokenizer, wants):
        forced = watcher.forced()
        written.append(own if forced is None else forced)
        watcher.take(written[-1])
    return tokenizer.decode(written)


def test_the_end_comes_at_the_first_newline_from_the_budget_on(tokenizer: Tokenizer) -> None:
    text = answered(tokenizer, "ab\ncdef\n" + "g" * 40, tokens=5, grace=10)
    assert text.startswith("ab\ncdef\n</think>\n\nggg")


def test_without_a_newline_the_end_comes_after_the_grace(tokenizer: Tokenizer) -> None:
    text = answered(tokenizer, "x" * 60, tokens=5, grace=3)
    assert text.startswith("x" * 8 + "\n</think>\n\nxxx")


def test_a_natural_end_switches_the_budget_off(tokenizer: Tokenizer) -> None:
    wants = "ab</think>" + "answer\n" * 6
    assert answered(tokenizer, wants, tokens=11, grace=2) == wants


def test_an_end_that_has_begun_is_not_written_twice(tokenizer: Tokenizer) -> None:
    text = answered(tokenizer, "abcd\n" + "e" * 40, tokens=5, grace=0)
    assert text.startswith("abcd\n</think>\n\neee")
    budget_in_mid_marker = answered(tokenizer, "abc</think>answer" + "x" * 30, tokens=5, grace=0)
    assert budget_in_mid_marker.count("</think>") == 1


def test_a_budget_of_nothing_closes_the_thought_at_once(tokenizer: Tokenizer) -> None:
    assert answered(tokenizer, "x" * 40, tokens=0, grace=9).startswith("</think>\n\nxxx")


@pytest.mark.parametrize("prompt", ["hello", "<think></think>", "<think> a", ""])
def test_a_prompt_that_opens_no_thought_has_no_budget(tokenizer: Tokenizer, prompt: str) -> None:
    wants = "x\n" * 20
    assert answered(tokenizer, wants, tokens=2, grace=1, prompt=prompt) == wants


@pytest.mark.parametrize("prompt", ["<think>", "a<think>\n", "<think> \n\n", "</think><think>\n"])
def test_white_space_may_follow_the_open_marker(tokenizer: Tokenizer, prompt: str) -> None:
    ids: Sequence[int] = encode(tokenizer, prompt)
    blanks = blanks_of(tokenizer, ids, OPENED)
    assert blanks is not None
    assert tokenizer.decode(blanks) == prompt.rpartition(">")[2]
