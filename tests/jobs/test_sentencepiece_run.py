"""A run on token files of a SentencePiece model, and text from it."""

from pathlib import Path

import pytest
import sentencepiece

from hybrid_train.data.any_tokenizer import open_tokenizer
from tests.jobs.command import finish, start, train
from tests.unit.data.prepare.texts import CORPUS, json_lines

pytestmark = pytest.mark.xdist_group("train")


@pytest.mark.slow
@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_run_and_its_text_take_a_sentencepiece_model(tmp_path: Path, named: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(model / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    tokenizer = model if named == "folder" else model / "tokenizer.model"
    (tmp_path / "a.jsonl").write_bytes(json_lines(CORPUS))
    made = finish(start(
        "data", "tokenize", f"input={tmp_path / 'a.jsonl'}", f"output={tmp_path / 'a'}",
        f"tokenizer={tokenizer}", "workers=1",
    ))  # fmt: skip
    assert made.code == 0, made.err
    files = (f"data.train=[{tmp_path / 'a'}]", f"data.tokenizer={tokenizer}")
    trained = train(tmp_path / "run", "data=files", *files, "train.tokens=2k")
    assert trained.code == 0, trained.err
    kept = open_tokenizer(tmp_path / "run" / "tokenizer")
    assert kept.fingerprint == open_tokenizer(tokenizer).fingerprint
    asked = (f"checkpoint={tmp_path / 'run'}", "prompt=def name7(x):", "max_new_tokens=4")
    written = finish(start("generate", *asked))
    assert written.code == 0, written.err
    assert "def name7(x):" in written.out
