import pytest

from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.jobs.generate import GrowingText, write_continuations


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token per byte, as there are no merges to learn."""
    return train_byte_level_bpe(["a"], vocab_size=257)


def test_a_piece_is_given_once(tokenizer: Tokenizer) -> None:
    text = GrowingText(tokenizer, tokenizer.encode("in"))
    pieces = []
    for token in [*tokenizer.encode("put"), None]:
        text.add(token)
        pieces.append(text.fresh())
    assert pieces == ["p", "u", "t", ""]


def test_a_character_of_several_bytes_is_held_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    text = GrowingText(tokenizer, tokenizer.encode("x"))
    pieces = []
    for token in tokenizer.encode("\u20ac!"):  # three bytes, then one
        text.add(token)
        pieces.append(text.fresh())
    assert pieces == ["", "", "\u20ac", "!"]


def test_bytes_that_end_in_mid_character_are_given_at_the_end(tokenizer: Tokenizer) -> None:
    text = GrowingText(tokenizer, tokenizer.encode("x"))
    text.add(tokenizer.encode("\u20ac")[0])
    assert text.fresh() == ""
    assert text.fresh(last=True) == "\ufffd"


def test_the_end_of_document_is_no_text(tokenizer: Tokenizer) -> None:
    text = GrowingText(tokenizer, [tokenizer.end_of_document])
    for token in [*tokenizer.encode("a\tb \n"), tokenizer.end_of_document]:
        text.add(token)
    assert text.fresh(last=True) == "a\tb \n"


def test_one_text_is_shown_as_it_is(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [[token] for token in tokenizer.encode(" x:\n\tpass")]
    write_continuations(["def f"], [GrowingText(tokenizer, tokenizer.encode("def f"))], steps)
    shown = capsys.readouterr()
    assert shown.out == "def f x:\n\tpass\n"
    assert shown.err.startswith("9 tokens in ")
    assert shown.err.endswith(" tokens/s\n")


def test_several_texts_are_told_apart(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [GrowingText(tokenizer, tokenizer.encode(prompt)) for prompt in ("a", "b")]
    x, y = tokenizer.encode("xy")
    write_continuations(["a", "b"], texts, [[None, x], [y, x], [y, None]])
    shown = capsys.readouterr()
    assert shown.out == "--- prompt 1 of 2 ---\nayy\n--- prompt 2 of 2 ---\nbxx\n"
    assert shown.err.startswith("4 tokens in ")


def test_on_a_terminal_the_prompt_is_bold_and_comes_first(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    steps = ([token] for token in tokenizer.encode("bc"))
    write_continuations(["a"], [GrowingText(tokenizer, tokenizer.encode("a"))], steps)
    assert capsys.readouterr().out == "\x1b[1ma\x1b[0mbc\n"
