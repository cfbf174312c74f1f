"""The words of synthetic streams form a tokenizer like any other."""

from pathlib import Path

import pytest

from hybrid_train.data.synthetic import WordTokenizer
from hybrid_train.data.tokenizers import END_OF_DOCUMENT, Tokenizer
from hybrid_train.schema.problems import UserError

WORDS = ["c0", "|", "(1", ")1", "7", "=", "?"]


def test_text_goes_to_ids_and_back() -> None:
    tokenizer = WordTokenizer(WORDS)
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("c0 ( 1".replace("( ", "(") + "  =\n?") == [1, 3, 6, 7]
    assert tokenizer.encode_batch(["7", ""]) == [[5], []]
    assert tokenizer.decode([1, 3, 0]) == f"c0 (1 {END_OF_DOCUMENT}"
    assert tokenizer.decode([1, 3, 0], skip_special=True) == "c0 (1"


def test_the_saved_folder_is_read_as_one_of_hugging_face(tmp_path: Path) -> None:
    words = WordTokenizer(WORDS)
    words.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == words.vocab_size
    assert loaded.end_of_document == words.end_of_document
    text = " ".join(WORDS)
    assert loaded.encode(text) == words.encode(text)
    for ids in ([1, 2, 0, 7], [3, 99]):
        for skip in (True, False):
            assert loaded.decode(ids, skip_special=skip) == words.decode(ids, skip_special=skip)


@pytest.mark.parametrize("word", ["c1", END_OF_DOCUMENT])
def test_a_word_of_another_vocabulary_is_named(word: str) -> None:
    with pytest.raises(UserError, match=r"is no word of this run's 7; .* such as c0, \|"):
        WordTokenizer(WORDS).encode(f"c0 {word}")


@pytest.mark.parametrize("words", [["a", "a"], ["a b"], [""], [END_OF_DOCUMENT]])
def test_words_that_could_not_be_told_apart_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="differ and have no spaces"):
        WordTokenizer(words)


def test_the_fingerprint_follows_the_words() -> None:
    first, same, other = (WordTokenizer(w) for w in (WORDS, WORDS, WORDS[::-1]))
    assert first.fingerprint == same.fingerprint != other.fingerprint
