"""Words are cut where the tokenizers library cuts them, for every pattern that is taken over."""

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from hybrid_train.data.prepare.encoder import translated_pattern, word_pattern
from tests.sampled import sampled

LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": None,
    "cl100k": CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}?|\p{{N}}{{1,3}}|{REST}",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|{REST}",
}
BASIC_PLANE = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
TEXTS = st.text(
    st.one_of(
        st.sampled_from(
            "abXYZ  \n\r\t''sStTlLvVeErRdD09.,;/!?\u00a0\u00e9\u0301\u4e2d\u017f\u2028"
        ),
        st.characters(exclude_categories=["Cs"]),
    )
)


def described(name: str, **changes: Any) -> str:
    """The tokenizer.json of a byte-level BPE with one of the patterns."""
    made = Tokenizer(models.BPE())
    source = PATTERNS[name]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=source is None)
    steps = [pre_tokenizers.Split(Regex(source), "isolated"), last] if source else []
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if steps else last
    content = json.loads(made.to_str())
    return json.dumps(content | changes)


def library_words(name: str, text: str) -> list[str]:
    source = PATTERNS[name]
    if source is not None:
        split = pre_tokenizers.Split(Regex(source), "isolated")
        return [word for word, _ in split.pre_tokenize_str(text)]
    cuts = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cuts]


@pytest.mark.parametrize("name", sampled(PATTERNS, "o200k"))
def test_every_character_of_the_basic_plane_is_classed_as_the_library_does(name: str) -> None:
    pattern = word_pattern(described(name))
    assert pattern is not None
    fitting = [char for char in BASIC_PLANE if pattern.fits(char)]
    # all that are assigned, a handful more or less
    assert len(fitting) > 60_000
    assert all(unicodedata.category(char) == "Cn" for char in set(BASIC_PLANE) - set(fitting))
    for start in range(0, len(fitting), 64):
        text = "".join(f"ab {c}cd{c}{c}12{c} x{c}\n{c} " for c in fitting[start : start + 64])
        assert pattern.words.findall(text) == library_words(name, text)


@pytest.mark.parametrize("name", PATTERNS)
@given(text=TEXTS)
def test_any_text_that_fits_is_cut_as_the_library_cuts_it(name: str, text: str) -> None:
    pattern = word_pattern(described(name))
    assert pattern is not None
    if pattern.fits(text):
        assert pattern.words.findall(text) == library_words(name, text)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("plain", True),
        ("\u4e2d\u6587 caf\u00e9", True),
        ("\U0001f600", True),  # a symbol
        ("\U00020000", False),  # a letter beyond the basic plane
        ("\u0378", False),  # not assigned
    ],
)
def test_what_may_be_cut_otherwise_does_not_fit(text: str, fits: bool) -> None:
    pattern = word_pattern(described("gpt2"))
    assert pattern is not None
    assert pattern.fits(text) == fits


def test_a_text_with_an_added_token_does_not_fit_and_with_a_special_one_it_does() -> None:
    base = {"id": 1, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [
        base | {"content": "<tool>", "special": False},
        base | {"content": "<end>", "special": True},
    ]
    pattern = word_pattern(described("gpt2", added_tokens=tokens))
    assert pattern is not None
    assert not pattern.fits("a <tool> b")
    assert pattern.fits("a <end> b")


def test_accents_that_the_tokenizer_would_compose_do_not_fit() -> None:
    pattern = word_pattern(described("gpt2", normalizer={"type": "NFC"}))
    assert pattern is not None
    assert pattern.fits("caf\u00e9")
    assert not pattern.fits("cafe\u0301")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "dropout": 0.1}},
    ],
)
def test_another_kind_of_tokenizer_has_no_pattern(changes: dict[str, object]) -> None:
    assert word_pattern(described("gpt2", **changes)) is None


@pytest.mark.parametrize(
    "source", [r"\p{Han}+", r"^a", r"(?<=a)b", r"a(?=b)", r"[[:alpha:]]", r"[a&&b]", r"\w+", r"(a"]
)
def test_a_pattern_with_unknown_parts_is_not_taken_over(source: str) -> None:
    assert translated_pattern(source) is None


def test_the_normalizer_of_a_real_tokenizer_is_recognised() -> None:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pattern = word_pattern(made.to_str())
    assert pattern is not None
    assert pattern.nfc
