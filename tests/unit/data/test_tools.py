"""The scripts of data_tools, called as from a command line."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import build_quickstart
from hybrid_train.config.commands import COMMANDS

ROOT = Path(__file__).parents[3]


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

    prefix = folder / "vocab-300" / "train"
    script = ROOT / "data_tools" / "inspect_shard.py"
    asked = [f"input={prefix}", f"tokenizer={folder / 'vocab-300' / 'tokenizer'}", "document=0"]
    done = called(script, *asked)
    assert "29 documents" in done.stdout
    assert "value0 = 0" in done.stdout
    refused = called(script, f"input={prefix}", "document=29")
    assert refused.returncode == 2
    assert "go from 0 to 28" in refused.stderr


def called(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, env=environment
    )


SCRIPTS = {
    "tokenize_text": "tokenize", "merge_shards": "merge", "split_shard": "split",
    "inspect_shard": "inspect", "count_tokens": "count", "verify_shard": "verify",
    "train_tokenizer": "train_tokenizer",
}  # fmt: skip


def test_every_job_that_prepares_data_has_a_script() -> None:
    others = {path.stem for path in (ROOT / "data_tools").glob("*.py")} - SCRIPTS.keys()
    assert others == {"build_quickstart"}
    assert {f"data {job}" for job in SCRIPTS.values()} <= COMMANDS.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_its_job(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "data_tools" / f"{script}.py")
    monkeypatch.setattr("sys.argv", [path, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"`hybrid-train data {SCRIPTS[script]}` ")


def test_a_vocabulary_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, build_quickstart, "--folder", tmp_path / "a", "--vocab-size", 9) == 2
    assert "vocab_size = 9" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
