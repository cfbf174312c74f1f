"""Texts as tokens of a run against lm-eval's own backend with the tokenizer of our export."""

import re
import shutil
from pathlib import Path

import pytest

from hybrid_train.evaluation.harness import LiveModel
from hybrid_train.evaluation.reader import LmEvalReader
from hybrid_train.schema.problems import UserError
from tests.harness_folders import AROUND, Folders, written
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS


@pytest.fixture(scope="module", params=AROUND)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return written(tmp_path_factory.mktemp("reader"), AROUND[request.param])


def test_texts_have_the_tokens_of_lm_evals_backend(folders: Folders) -> None:
    theirs = folders.theirs()
    reader = LmEvalReader.of(folders.run, folders.settings())
    ours = LiveModel(reader, None, folders.settings())  # type: ignore[arg-type]
    texts = ["hello world", " a  b", "<s>line", "<turn>user\nü</turn>", "x \n ", "one</s>two", ""]
    for text in texts:
        assert ours.tok_encode(text) == theirs.tok_encode(text), text
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(
            text, add_special_tokens=False
        )
    for context in texts[:-1]:
        for continuation in ("hel", " line", "\n", "</turn>"):
            pair = (context, continuation)
            assert ours._encode_pair(*pair) == theirs._encode_pair(*pair), pair
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id


def test_a_conversation_goes_on_from_what_the_answer_begins_with(folders: Folders) -> None:
    reader = LmEvalReader.of(folders.run, folders.settings(apply_chat_template=True))
    ours = LiveModel(reader, None, folders.settings())  # type: ignore[arg-type]
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a good"}]
    for add in (True, False):
        said = history[: 1 + (not add)]
        assert ours.apply_chat_template(said, add) == folders.theirs().apply_chat_template(
            said, add
        )


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(
    folders: Folders, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(folders.run, run_dir, ignore=shutil.ignore_patterns("checkpoints"))
    config = run_dir / "config.yaml"
    config.write_text(re.sub(r"vocab_size: \d+", "vocab_size: 61", config.read_text()))
    with pytest.raises(UserError, match=r"has \d+ tokens, but the model knows 61"):
        LmEvalReader.of(run_dir, folders.settings())
