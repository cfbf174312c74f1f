"""Documents begin with a BOS token if it is asked for; if not, it is said that there is none."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece

from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.prepare.finished import verify_whole
from hybrid_train.data.prepare.tokenization import beginning_of_documents
from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.schema.problems import UserError
from tests.unit.data.prepare.texts import CORPUS, job, json_lines, read_ids, run

TEXTS = CORPUS[:20]
BEGIN = 1  # id of <s>


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    log = logging.getLogger("hybrid_train.data.prepare.tokenization")
    monkeypatch.setattr(log, "warning", lambda text, *words: said.append(text % words))
    return said


def folder(path: Path, how: str) -> Path:
    """Write a tokenizer that begins a text in one of the ways there are."""
    if how == "sentencepiece":
        path.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=str(path / "tokenizer"), vocab_size=100,
            minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
        (path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
        return path
    train_byte_level_bpe(CORPUS, 300, ["<|endoftext|>", "<s>"]).save(path)
    settings = {"eos_token": "<|endoftext|>"}
    if how != "none":
        settings["bos_token"] = "<s>"
    if how == "settings":
        settings["add_bos_token"] = True  # type: ignore[assignment]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (path / name).write_text(json.dumps(settings))
    if how == "post-processor":
        content = json.loads((path / "tokenizer.json").read_text())
        begin = {"id": "<s>", "ids": [BEGIN], "tokens": ["<s>"]}
        single = [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        template = {"type": "TemplateProcessing", "single": single, "pair": single}
        content["post_processor"] = template | {"special_tokens": {"<s>": begin}}
        (path / "tokenizer.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("how", ["post-processor", "settings", "sentencepiece", "named", "none"])
def test_the_bos_token_is_the_one_that_the_tokenizer_would_put_there(
    tmp_path: Path, warnings: list[str], how: str
) -> None:
    place = folder(tmp_path / "t", how)
    tokenizer = open_tokenizer(place)
    assert beginning_of_documents(job(tmp_path, tokenizer=str(place)), tokenizer) == ()
    if how in ("settings", "named", "none"):
        assert not warnings  # the tokenizer adds nothing: tokenizer.json alone says what it does
    else:
        (said,) = warnings
        assert f"{place} begins a text with <s> ({BEGIN}), the documents of these files do" in said
    asked = job(tmp_path, tokenizer=str(place), bos=True)
    if how == "none":
        with pytest.raises(UserError, match=r"bos=true: the tokenizer .* names no bos_token"):
            beginning_of_documents(asked, tokenizer)
    else:
        assert beginning_of_documents(asked, tokenizer) == (BEGIN,)
    assert len(warnings) <= 1


@pytest.mark.parametrize("word_cache", [False, True])
def test_every_document_begins_with_the_bos_token(tmp_path: Path, word_cache: bool) -> None:
    place = folder(tmp_path / "t", "post-processor")
    tokenizer = open_tokenizer(place)
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    asked = job(tmp_path, tmp_path / "a.jsonl", tokenizer=str(place), word_cache=word_cache)
    run(replace(asked, bos=True))
    ids = [[BEGIN, *tokenizer.encode(text), tokenizer.end_of_document] for text in TEXTS]
    assert read_ids(tmp_path / "out") == ids
    assert verify_whole(str(tmp_path / "out"), None).faults == []


def test_a_stopped_job_does_not_go_on_with_other_beginnings(tmp_path: Path) -> None:
    place = folder(tmp_path / "t", "named")
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS) + b"bad\n")
    with pytest.raises(UserError, match="max_bad_share"):
        run(job(tmp_path, tmp_path / "a.jsonl", tokenizer=str(place)))
    with pytest.raises(UserError, match="bos was False and is True"):
        run(job(tmp_path, tmp_path / "a.jsonl", tokenizer=str(place), bos=True))
