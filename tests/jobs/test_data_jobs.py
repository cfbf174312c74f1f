"""The jobs around token files, as from a command line: each says what it did."""

import json
from pathlib import Path

import pytest

from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.token_files import TokenReader
from hybrid_train.jobs import cli
from hybrid_train.jobs.text_progress import TextProgress
from hybrid_train.runtime.logs import start_logging
from tests.unit.data.prepare.texts import CORPUS, Progress, json_lines


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with texts, in which every command runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Path("a.jsonl").write_bytes(json_lines(CORPUS))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert cli.main(["data", *words]) == code
    shown = capsys.readouterr()
    return shown.out + shown.err


def trained(capsys: pytest.CaptureFixture[str], output: str, *words: str) -> str:
    asked = ("input=a.jsonl", f"output={output}", "vocab_size=300", *words)
    return said(capsys, "train_tokenizer", *asked)


def test_from_text_to_verified_parts_and_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "vocabulary 300 of 300 asked for, from 300 documents" in trained(capsys, "t")
    asked = ("input=a.jsonl", "output=out", "tokenizer=t", "workers=1")
    text = said(capsys, "tokenize", *asked)
    tokens = TokenReader("out").facts.tokens
    assert "a.jsonl        300" in text
    assert "tokens/s" in text
    assert "def name7(x):" in said(capsys, "inspect", "input=out", "document=7")
    assert "from 0 to 299" in said(capsys, "inspect", "input=out", "document=300", code=2)
    split = ("input=out", "output=out", "shares=[0.9,0.1]", "names=[train,validation]")
    assert "out-validation         30" in said(capsys, "split", *split)
    table = said(capsys, "count", "input=out-*")
    assert table.splitlines()[-1].split()[:3] == ["total", "300", f"{tokens:,}"]
    said(capsys, "split", "input=out", "output=s", "tokens_per_shard=1k")
    said(capsys, "merge", "input=s-*", "output=again")
    assert Path("again.bin").read_bytes() == Path("out.bin").read_bytes()
    assert "out: whole, 300 documents" in said(capsys, "verify", "input=out")
    Path("again.bin").write_bytes(b"\xff" * (2 * tokens))
    text = said(capsys, "verify", "input=out,again", code=2)
    assert "again: faulty" in text
    assert "again.bin has another checksum" in text


def test_special_tokens_are_named_on_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(capsys, "t", "special_tokens=<|end|>,<|pad|>")
    tokenizer = open_tokenizer("t")
    assert tokenizer.decode([0, 1]) == "<|end|><|pad|>"
    assert tokenizer.end_of_document == 0


def test_a_sample_is_drawn_by_its_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = ("sample_share=0.5", "block_kb=1")
    first = trained(capsys, "x", *share)
    count = int(first.split(" documents")[0].rpartition(" ")[2])
    assert 60 < count < 240  # of 300
    trained(capsys, "y", *share)
    trained(capsys, "z", *share, "seed=5")
    contents = [(folder / name / "tokenizer.json").read_bytes() for name in "xyz"]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("input=a.jsonl", "output=a.jsonl", "vocab_size=300"), "a.jsonl exists"),
        (("input=a.jsonl", "output=t", "text_key=body"), "300 bad lines"),
        (("input=none", "output=t"), "no such file"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_explained(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in said(capsys, "train_tokenizer", *words, code=2)
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]


def test_a_tokenizer_without_an_end_of_document_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(capsys, "t")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((folder / "t" / name).read_text())
        del content["eos_token"]
        (folder / "t" / name).write_text(json.dumps(content))
    asked = ("input=a.jsonl", "output=out", "tokenizer=t")
    assert "add eos_token to its tokenizer_config.json" in said(capsys, "tokenize", *asked, code=2)
    assert not list(folder.glob("out*"))


def test_speed_and_time_left_are_those_of_this_start(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    shown = TextProgress(terminal=False, clock=lambda: now[0])
    start_logging()
    with shown:
        shown.update(Progress(400, 1000, documents=4, tokens=4000, bad=0))  # of an earlier start
        now[0] = 40.0
        shown.update(Progress(600, 1000, documents=6, tokens=6000, bad=1))
    assert shown.speed() == "2k tokens in 40.0 s: 50 tokens/s"
    assert capsys.readouterr().err.splitlines() == [
        "going on behind document 4 (4k tokens)",
        # 200 bytes took 40 s, and 400 are left
        "60.0%  6 documents  6k tokens  50 tok/s  1 bad  left 0:01:20",
    ]
