"""Text that grows token by token equals the text that is decoded as a whole."""

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from hybrid_train.data.any_tokenizer import FolderTokenizer
from hybrid_train.data.sentencepiece import SentencePieceTokenizer
from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.generation.text import AnswerText, GrowingText

if TYPE_CHECKING:
    from collections.abc import Callable

LINES = ["for i in range(10):\n\tprint(i, 'caf\u00e9')", "x = [1, 2]  # \u20ac \U0001f600"] * 20


def byte_level(folder: Path) -> FolderTokenizer:
    return train_byte_level_bpe(LINES, vocab_size=300)


def piecewise(folder: Path) -> FolderTokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return SentencePieceTokenizer.load(folder)


def joined_bytes(folder: Path) -> FolderTokenizer:
    """As the tokenizer.json of Llama 2: bytes in <0x..>, which its decoder joins."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcx"]
    words += ["\u2581a", "\u2581ab"]
    merges = [("\u2581", "a"), ("\u2581a", "b")]
    backend = Backend(
        models.BPE(
            {word: number for number, word in enumerate(words)}, merges,
            unk_token="<unk>", byte_fallback=True,
        )
    )  # fmt: skip
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


@pytest.fixture(scope="module", params=[byte_level, piecewise, joined_bytes])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> FolderTokenizer:
    make: Callable[[Path], FolderTokenizer] = request.param
    return make(tmp_path_factory.mktemp("tokenizer"))


def given(tokenizer: FolderTokenizer, prompt: list[int], answer: list[int]) -> str:
    growing, pieces, rest = GrowingText(tokenizer, prompt), [], ""
    for token in answer:
        piece, rest = growing.add(token)
        pieces.append(piece)
    return "".join(pieces) + rest


def expected(tokenizer: FolderTokenizer, prompt: list[int], answer: list[int]) -> str:
    whole = tokenizer.decode([*prompt, *answer], skip_special=True)
    return whole[len(tokenizer.decode(prompt, skip_special=True)) :]


@pytest.mark.parametrize("seed", range(4))
def test_any_tokens_give_the_text_that_the_whole_is_decoded_to(
    tokenizer: FolderTokenizer, seed: int
) -> None:
    """Tokens at random: bytes that fit nowhere, special tokens in between, blanks in rows."""
    draw = random.Random(seed)
    few = [draw.randrange(tokenizer.vocab_size) for _ in range(12)]
    for length in (1, 3, 30, 200):
        for pool in (range(tokenizer.vocab_size), few):
            prompt = tokenizer.encode(draw.choice(["a", "ab x", "  ", "= [1, 2] a"]))
            answer = draw.choices(pool, k=length)
            assert given(tokenizer, prompt, answer) == expected(tokenizer, prompt, answer)


def test_text_of_many_bytes_is_given_whole(tokenizer: FolderTokenizer) -> None:
    for text in (
        "caf\u00e9 \u20ac5",
        "\U0001f600" * 20,
        "a\n\n\tb",
        "   a",
        "\ufffd\ufffd\ufffd x",
    ):
        prompt, answer = tokenizer.encode("ab"), tokenizer.encode(text)
        assert given(tokenizer, prompt, answer) == expected(tokenizer, prompt, answer)


def test_a_blank_behind_many_tokens_without_text_is_kept(tokenizer: FolderTokenizer) -> None:
    """Where a text begins, such a tokenizer drops it; here none begins."""
    prompt = tokenizer.encode("ab")
    answer = [tokenizer.end_of_document] * 40 + tokenizer.encode("  ab")
    assert given(tokenizer, prompt, answer) == expected(tokenizer, prompt, answer) != "ab"


def test_the_end_of_a_prompt_is_not_shown_again(tokenizer: FolderTokenizer) -> None:
    """Not even a newline that is a byte, which one behind it might still change."""
    prompt = tokenizer.encode("ab\n\n")
    for text in ("abc", "\nx", "\u20ac"):
        answer = tokenizer.encode(text)
        assert given(tokenizer, prompt, answer) == expected(tokenizer, prompt, answer)


def test_no_piece_is_ever_taken_back(tokenizer: FolderTokenizer) -> None:
    """What was given after each token is the begin of the whole."""
    draw = random.Random(7)
    prompt = tokenizer.encode("ab")
    answer = draw.choices(range(tokenizer.vocab_size), k=300)
    whole = expected(tokenizer, prompt, answer)
    growing, so_far = GrowingText(tokenizer, prompt), ""
    for token in answer:
        so_far += growing.add(token)[0]
        assert whole.startswith(so_far)


def test_a_token_costs_the_same_at_the_end_of_a_long_text(tokenizer: FolderTokenizer) -> None:
    """Counted, not timed: tokens that are decoded for one more."""
    text = GrowingText(tokenizer, tokenizer.encode("ab " * 500))
    decoded: list[int] = []
    decode = tokenizer.decode

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
            decoded.append(len(ids))
            return decode(ids, skip_special=skip_special)

    text._tokenizer = Counting()  # type: ignore[assignment]
    for token in tokenizer.encode("x = [1, 2] abc " * 300):
        text.add(token)
    assert max(decoded) < 100
    assert sum(decoded) / len(decoded) < 30


def test_a_character_of_several_bytes_is_held_back_until_it_is_whole() -> None:
    tokenizer = train_byte_level_bpe(["a"], vocab_size=257)
    text = GrowingText(tokenizer, tokenizer.encode("x"))
    pieces = [text.add(token) for token in tokenizer.encode("\u20ac!")]  # three bytes, then one
    assert pieces == [("", "\ufffd"), ("", "\ufffd"), ("\u20ac", ""), ("!", "")]


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """A token per byte, as there are no merges to learn."""
    return train_byte_level_bpe(["a"], vocab_size=257)


def streamed(
    tokenizer: FolderTokenizer, text: str, stops: list[str], *, include: bool = False
) -> tuple[list[str], bool]:
    """What is given out after each token, and whether a stop ended it."""
    answer = AnswerText(tokenizer, tokenizer.encode("x"), stops, include_stop=include)
    pieces = []
    for token in tokenizer.encode(text):
        is_over = answer.take(token)
        pieces.append(answer.fresh())
        if is_over:
            return pieces, True
    answer.close()
    return [*pieces, answer.fresh()], False


def test_no_part_of_a_stop_is_ever_shown(letters: Tokenizer) -> None:
    pieces, is_over = streamed(letters, "ab</s", ["</s>"])
    assert (pieces, is_over) == (["a", "b", "", "", "", "</s"], False)
    pieces, is_over = streamed(letters, "ab</s>cd", ["</s>"])
    assert (pieces, is_over) == (["a", "b", "", "", "", ""], True)


def test_a_begin_that_leads_nowhere_is_shown_at_once(letters: Tokenizer) -> None:
    assert streamed(letters, "aab!", ["aaa"])[0] == ["", "", "aab", "!", ""]
    # The second a may be the first of the stop.
    assert "".join(streamed(letters, "aaab", ["aab"])[0]) == "a"


def test_the_stop_can_be_part_of_the_text(letters: Tokenizer) -> None:
    assert "".join(streamed(letters, "ab\n\ncd", ["\n\n"], include=True)[0]) == "ab\n\n"


def test_of_two_stops_the_first_that_is_complete_counts_and_of_those_the_longest(
    letters: Tokenizer,
) -> None:
    assert "".join(streamed(letters, "abcdef", ["bcde", "cd"])[0]) == "ab"
    assert "".join(streamed(letters, "abcdef", ["bcd", "cd"])[0]) == "a"


@pytest.mark.parametrize("include", [False, True])
def test_the_text_does_not_depend_on_how_it_is_cut_into_tokens(include: bool) -> None:
    draw = random.Random(3)
    texts = ["".join(draw.choices("abc\u20ac ", k=40)) for _ in range(60)]
    fine, coarse = (train_byte_level_bpe(texts, vocab_size=size) for size in (257, 400))
    assert len(fine.encode(texts[0])) > 1.5 * len(coarse.encode(texts[0]))
    for text in texts:
        stops = ["".join(draw.choices("abc\u20ac ", k=count)) for count in (2, 3, 4)]
        one, other = (
            "".join(streamed(kind, text, stops, include=include)[0]) for kind in (fine, coarse)
        )
        ends = sorted(
            (text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text
        )
        cut = ends[0][0 if include else 1] if ends else len(text)
        assert one == other == text[:cut]


def test_a_stop_of_bytes_is_noticed_before_the_next_token(tmp_path: Path) -> None:
    """A newline of such a tokenizer is a byte, whose text the next byte may still change."""
    tokenizer = joined_bytes(tmp_path)
    answer = AnswerText(tokenizer, tokenizer.encode("a"), ["\n"])
    newline = tokenizer.encode("\n")[-1]
    assert tokenizer.is_joined_byte(newline)
    assert answer.take(newline)


def test_many_tokens_take_little_time(letters: Tokenizer) -> None:
    tokens = letters.encode("word " * 2000)
    answer = AnswerText(letters, tokens[:5], ["\n\n", "END"])
    start = time.perf_counter()
    for token in tokens:
        answer.take(token)
    assert time.perf_counter() - start < 20  # decoding all again each time takes minutes
    answer.close()
    assert answer.text == "word " * 2000
