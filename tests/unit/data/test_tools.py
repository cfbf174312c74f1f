"""The scripts of data_tools, called as from a command line."""

from pathlib import Path

import numpy as np
import pytest

from data_tools import build_quickstart, inspect_shard


def call(monkeypatch: pytest.MonkeyPatch, tool: object, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["tool", *map(str, arguments)])
    return int(tool.main())  # type: ignore[attr-defined]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    folder.mkdir()
    for i in range(30):
        (folder / f"m{i}.py").write_text(f"value{i} = {i}\n" * 5)
    return folder


def test_a_corpus_is_built_and_one_of_its_documents_shown(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "out"
    build = ("--folder", folder, "--vocab-size", 300, "--source", source)
    assert call(monkeypatch, build_quickstart, *build) == 0
    assert "tokens in 29 files" in capsys.readouterr().out

    prefix, tokenizer = folder / "vocab-300" / "train", folder / "vocab-300" / "tokenizer"
    shown = (prefix, "--tokenizer", tokenizer, "--document", 0)
    assert call(monkeypatch, inspect_shard, *shown) == 0
    text = capsys.readouterr().out
    assert "29 documents" in text
    assert "value0 = 0" in text

    assert call(monkeypatch, inspect_shard, prefix, "--document", 29) == 2
    assert "go from 0 to 28" in capsys.readouterr().err


def test_a_vocabulary_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, build_quickstart, "--folder", tmp_path / "a", "--vocab-size", 9) == 2
    assert "vocab_size = 9" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_histogram_has_a_line_for_each_power_of_two() -> None:
    lines = inspect_shard.histogram(np.array([2, 3, 3, 9], dtype=np.int32))
    counts = [(*line.split()[:1], *line.split()[2:4]) for line in lines]
    assert counts == [("2", "3", "3"), ("4", "7", "0"), ("8", "15", "1")]
