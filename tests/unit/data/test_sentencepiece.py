"""A SentencePiece model serves wherever a Hugging Face tokenizer does."""

import hashlib
import json
from pathlib import Path

import pytest
import sentencepiece

from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.sentencepiece import SentencePieceTokenizer
from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.schema.problems import UserError

LINES = [f"the cat number {i} sat on the mat of the dog {i * i}" for i in range(200)]


def trained(folder: Path, **options: object) -> Path:
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, minloglevel=2, **options,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.load(folder)


def test_ids_are_those_of_the_library(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    bare = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.encode_batch(LINES) == [bare.encode(line) for line in LINES]
    assert tokenizer.encode(LINES[3]) == bare.encode(LINES[3])
    assert tokenizer.vocab_size == bare.vocab_size() == 320
    assert tokenizer.end_of_document == bare.eos_id()


@pytest.mark.parametrize("text", ["the cat", "caf\u00e9 \u4e2d \U0001f600", "a </s> b"])
def test_text_comes_back_and_cannot_close_a_document(
    tokenizer: SentencePieceTokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_left_out_on_request(tokenizer: SentencePieceTokenizer) -> None:
    ids = [*tokenizer.encode("the cat"), tokenizer.end_of_document]
    assert tokenizer.decode(ids) == "the cat</s>"
    assert tokenizer.decode(ids, skip_special=True) == "the cat"


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_a_folder_or_a_file_is_opened_by_what_it_holds(folder: Path, name: str) -> None:
    found = open_tokenizer(folder / name)
    assert isinstance(found, SentencePieceTokenizer)
    content = (folder / "tokenizer.model").read_bytes()
    assert found.fingerprint == hashlib.sha256(content).hexdigest()


def test_a_folder_with_both_is_read_by_its_tokenizer_json(tmp_path: Path) -> None:
    trained(tmp_path / "both")
    train_byte_level_bpe(LINES, 300).save(tmp_path / "both")
    assert isinstance(open_tokenizer(tmp_path / "both"), Tokenizer)


def test_a_saved_model_is_read_back(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.encode(LINES[0]) == tokenizer.encode(LINES[0])
    assert again.fingerprint == tokenizer.fingerprint
    assert again.end_of_document == tokenizer.end_of_document


def test_a_model_without_an_end_takes_that_of_its_folder_or_is_refused(tmp_path: Path) -> None:
    options = {"eos_id": -1, "user_defined_symbols": ["<end>"]}
    folder = trained(tmp_path / "endless", **options)
    with pytest.raises(UserError, match=r"no end-of-document token.* as eos_token in"):
        open_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    found = open_tokenizer(folder)
    assert found.decode([found.end_of_document]) == "<end>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(UserError, match="no end-of-document token"):
        open_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "holds no tokenizer"), ("none.model", "does not exist"), ("bad.model", "is no Sen")],
)
def test_what_is_no_tokenizer_is_explained(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=message):
        open_tokenizer(tmp_path / name)
