"""What may not be read or written is named with its path, whoever meets it first."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hybrid_train.config.rules_of_data import token_files_exist, tokenizer_exists
from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.index_cache import IndexCache
from hybrid_train.data.prepare.manifest import read_manifest
from hybrid_train.data.quickstart import prepare
from hybrid_train.data.run_data import check_data
from hybrid_train.jobs import cli
from hybrid_train.schema.data import Data, Quickstart
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from tests.unit.data.corpus import write_corpus
from tests.unit.data.documents import listed
from tests.unit.data.prepare.texts import CORPUS, TOKENIZER, json_lines


@pytest.fixture
def closed(tmp_path: Path, no_privilege: None) -> Iterator[Callable[[Path], Path]]:
    """Take all permissions from a path until the test is over."""
    before: dict[Path, int] = {}

    def close(path: Path) -> Path:
        before[path] = path.stat().st_mode
        path.chmod(0)
        return path

    yield close
    for path, mode in reversed(before.items()):
        path.chmod(mode)


@pytest.mark.parametrize(
    "name", ["a.bin", "a.idx", "a.json", "tokenizer", "tokenizer/tokenizer.json", "."]
)
def test_data_of_a_run_that_may_not_be_read_is_named(
    tmp_path: Path, closed: Callable[[Path], Path], name: str
) -> None:
    write_corpus(tmp_path / "in" / "a", [50, 50])
    TOKENIZER.save(tmp_path / "in" / "tokenizer")
    if name == "a.json":
        (tmp_path / "in" / name).write_text("{}")
    shut = closed(tmp_path / "in" / name)
    data = Data(train=[f"{tmp_path}/in/a"], tokenizer=f"{tmp_path}/in/tokenizer")
    # The rules of the configuration leave it to whoever opens the files.
    assert not [*token_files_exist(TrainJob(data=data)), *tokenizer_exists(TrainJob(data=data))]
    with pytest.raises(UserError, match=rf"{shut}\S* cannot be read: Permission denied"):
        check_data(data)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_file_of_a_tokenizer_that_may_not_be_read_is_named(
    tmp_path: Path, closed: Callable[[Path], Path], name: str
) -> None:
    TOKENIZER.save(tmp_path)
    closed(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} cannot be read: Permission denied"):
        open_tokenizer(tmp_path)


def test_a_manifest_that_may_not_be_read_is_named(
    tmp_path: Path, closed: Callable[[Path], Path]
) -> None:
    (tmp_path / "a.json").write_text("{}")
    closed(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json cannot be read: Permission denied"):
        read_manifest(tmp_path / "a")


def test_folders_that_may_not_be_written_are_named_with_their_setting(
    tmp_path: Path, closed: Callable[[Path], Path]
) -> None:
    (tmp_path / "in").mkdir()
    place = closed(tmp_path / "in")
    cache = IndexCache(place / "cache", keep_from=1)
    with pytest.raises(UserError, match=rf"{place}/cache/.* set data\.cache to a folder"):
        cache.array(("x",), listed(5), lambda: np.zeros(3, np.int64))
    with pytest.raises(UserError, match=rf"{place}/q/vocab-300.* set data\.folder to another"):
        prepare(Quickstart(folder=str(place / "q"), vocab_size=300))


@pytest.mark.parametrize("job", ["tokenize", "train_tokenizer", "merge", "split"])
def test_an_output_that_may_not_be_written_is_refused_first(
    tmp_path: Path, closed: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], job: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(CORPUS))
    TOKENIZER.save(tmp_path / "t")
    write_corpus(tmp_path / "a", [50, 50])
    (tmp_path / "in").mkdir()
    output = closed(tmp_path / "in") / "out"
    words = {
        "tokenize": [f"input={tmp_path}/a.jsonl", f"tokenizer={tmp_path}/t", "workers=1"],
        "train_tokenizer": [f"input={tmp_path}/a.jsonl", "vocab_size=300"],
        "merge": [f"input={tmp_path}/a"],
        "split": [f"input={tmp_path}/a", "shares=[0.5,0.5]"],
    }[job]
    assert cli.main(["data", job, *words, f"output={output}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert str(output) in said
    assert "Permission denied" in said


def test_a_tokenizer_that_failed_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["", ""]))
    words = [f"input={tmp_path}/a.jsonl", f"output={tmp_path}/t", "vocab_size=300"]
    assert cli.main(["data", "train_tokenizer", *words]) == 2
    assert os.listdir(tmp_path) == ["a.jsonl"]
