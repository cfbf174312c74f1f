"""Words that are looked up give the ids of the tokenizer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.data.prepare import encoder as module
from hybrid_train.data.prepare.encoder import Encoder, WordPattern, chunks
from tests.unit.data.prepare.texts import CORPUS, TOKENIZER, ids_of, some_texts

SHORT, LONG = np.dtype("<u2"), np.dtype("<i4")
ENCODER = Encoder(TOKENIZER, SHORT)


def decoded(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    found = encoder.encode(texts)
    ids = np.frombuffer(found.ids, encoder.dtype)
    ends = np.cumsum(np.frombuffer(found.lengths, "<i4"))
    assert ends[-1] == len(ids)
    return [part.tolist() for part in np.split(ids, ends[:-1])]


@given(st.lists(st.text(), min_size=1))
def test_any_texts_get_the_ids_of_the_tokenizer(texts: list[str]) -> None:
    assert ENCODER.looks_up_words
    assert decoded(ENCODER, texts) == ids_of(texts)


@pytest.mark.parametrize("dtype", [SHORT, LONG], ids=str)
@pytest.mark.parametrize("word_cache", [True, False])
def test_ids_do_not_depend_on_how_they_are_found(dtype: np.dtype, word_cache: bool) -> None:
    encoder = Encoder(TOKENIZER, dtype, word_cache=word_cache)
    assert encoder.looks_up_words == word_cache
    assert decoded(encoder, some_texts(60)) == ids_of(some_texts(60))


def test_no_texts_are_no_bytes() -> None:
    found = ENCODER.encode([])
    assert (found.ids, found.lengths) == (b"", b"")


def test_a_full_cache_starts_anew_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_WORDS", 20)
    encoder = Encoder(TOKENIZER, SHORT)
    assert decoded(encoder, CORPUS) == ids_of(CORPUS)
    assert len(encoder._words) <= 20


def test_a_long_text_is_cut_at_words_and_keeps_its_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 50)
    text = "It's the man who don't say \u4e2d\u6587, and two words  \n\n more.\n" * 40
    parts = list(chunks(text))
    assert "".join(parts) == text
    assert len(parts) > 20
    assert decoded(Encoder(TOKENIZER, SHORT), [text]) == ids_of([text])


def test_a_long_text_without_words_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 50)
    assert list(chunks("1" * 500)) == ["1" * 500]


def test_a_difference_from_the_tokenizer_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(TOKENIZER, SHORT)
    wrong = module.word_pattern(TOKENIZER.description)
    assert isinstance(wrong, WordPattern)
    monkeypatch.setattr(WordPattern, "fits", lambda *_: True)
    encoder._words["def"] = b"\x01\x00"
    with pytest.raises(RuntimeError, match="word_cache=false"):
        encoder.encode(["def f"])
