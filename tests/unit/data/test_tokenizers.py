"""A trained tokenizer writes any text, and transformers reads what it saves."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.tokenizers import END_OF_DOCUMENT, Tokenizer, train_byte_level_bpe
from hybrid_train.schema.formats import TOKENIZER as FORMAT
from hybrid_train.schema.problems import UserError

CORPUS = ["def f(x):\n    return x + 1\n", "the cat sat on the mat; the dog sat on the cat"] * 5
TOKENIZER = train_byte_level_bpe(CORPUS, vocab_size=300)


@given(st.text())
def test_any_text_comes_back_as_it_was(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", "  \t\n\r\n", "e\u0301 \u00e9", "\U0001f600\u200d", "\x00\x1f"]
)
def test_white_space_accents_and_control_characters_come_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_text_cannot_close_a_document() -> None:
    ids = TOKENIZER.encode(f"a {END_OF_DOCUMENT} b")
    assert TOKENIZER.end_of_document not in ids
    assert TOKENIZER.decode(ids) == f"a {END_OF_DOCUMENT} b"


def test_special_tokens_are_left_out_on_request() -> None:
    ids = [*TOKENIZER.encode("a"), TOKENIZER.end_of_document]
    assert TOKENIZER.decode(ids) == f"a{END_OF_DOCUMENT}"
    assert TOKENIZER.decode(ids, skip_special=True) == "a"


def test_the_vocabulary_has_the_size_asked_for_or_what_the_corpus_allows() -> None:
    varied = [f"name{i} = value{i * i}" for i in range(200)]
    assert train_byte_level_bpe(varied, vocab_size=300).vocab_size == 300
    assert train_byte_level_bpe(["ab ab"], 300).vocab_size == 257 + 2  # bytes, end; "ab", " ab"


def test_a_batch_is_encoded_like_its_texts() -> None:
    assert TOKENIZER.encode_batch(CORPUS) == [TOKENIZER.encode(text) for text in CORPUS]


def test_training_twice_gives_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "a")
    train_byte_level_bpe(CORPUS, vocab_size=300).save(tmp_path / "b")
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "ab")
    assert first == second


def test_a_saved_tokenizer_is_read_back(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(CORPUS[0]) == TOKENIZER.encode(CORPUS[0])
    assert loaded.end_of_document == TOKENIZER.end_of_document


def test_transformers_reads_a_saved_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        ids = TOKENIZER.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == TOKENIZER.end_of_document
    assert len(theirs) == TOKENIZER.vocab_size


def test_the_end_of_document_may_be_written_the_old_way(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    special = {"eos_token": {"content": END_OF_DOCUMENT, "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert Tokenizer.load(tmp_path).end_of_document == TOKENIZER.end_of_document


def test_a_tokenizer_says_its_format_and_one_from_elsewhere_says_none(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    said = json.loads(path.read_text())
    assert said["hybrid_train_format"] == FORMAT.stamp()
    said["hybrid_train_format"]["version"] += 1
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"tokenizer folder, format 2\).*upgrade hybrid_train"):
        open_tokenizer(tmp_path)
    del said["hybrid_train_format"]
    path.write_text(json.dumps(said))
    assert open_tokenizer(tmp_path).vocab_size == TOKENIZER.vocab_size


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("tokenizer_config.json", "{", "is no JSON"),
        (
            "tokenizer_config.json",
            '{"eos_token": "</s>"}',
            "lacks the end-of-document token '</s>'",
        ),
    ],
)
def test_a_broken_folder_is_explained(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_a_folder_without_an_end_of_document_token_is_refused(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match="add eos_token"):
        Tokenizer.load(tmp_path)


def test_a_fingerprint_is_that_of_the_file_and_survives_a_copy(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # the same, written another way
    loaded = Tokenizer.load(tmp_path / "a")
    assert loaded.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").fingerprint == loaded.fingerprint
    assert loaded.fingerprint != TOKENIZER.fingerprint


def test_a_folder_that_asks_for_short_texts_does_not_cut_documents(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content | {"truncation": cut}))
    assert Tokenizer.load(tmp_path).encode(CORPUS[1]) == TOKENIZER.encode(CORPUS[1])


def test_special_tokens_get_the_first_ids_and_the_first_ends_documents() -> None:
    trained = train_byte_level_bpe(CORPUS, 300, special_tokens=["<end>", "<pad>"])
    assert trained.end_of_document == 0
    assert trained.decode([0, 1]) == "<end><pad>"
