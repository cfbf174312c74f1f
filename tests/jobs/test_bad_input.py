"""Wrong commands: one message that names culprit and remedy, and nothing is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_train.config import compose, frozen
from hybrid_train.tracking import history
from tests.jobs.command import (
    ROOT,
    Finished,
    arguments,
    contents,
    finish,
    start,
    start_program,
    train,
)
from tests.unit.data.corpus import write_stray

pytestmark = pytest.mark.xdist_group("bad input")


def assert_refused(finished: Finished, run_dir: Path, *texts: str) -> None:
    """Check the exit code, the message, and that the run folder was not made."""
    assert finished.code == 2, finished.said
    assert "hybrid-train: " in finished.err
    assert "Traceback" not in finished.said
    for text in texts:
        assert text in finished.err
    assert not run_dir.exists()


# The sentences themselves: tests/unit/config/test_compose.py and test_checks.py.
MORE_CONFIGS = [
    (["model.pattern=MXM"], ["model.pattern = MXM", "'X'", "nearest: MM"]),
    (["train.global_batch=many"], ["train.global_batch = many", "whole number"]),
    (["parallel.expert=3"], ["parallel.expert = 3", "model.moe.experts (4)", "nearest: 1"]),
    (["parallel.tensor=3"], ["parallel.tensor = 3", "model.attention.heads (4)", "nearest: 1"]),
    (["checkpoint.load=nowhere"], ["checkpoint.load = nowhere", "no such folder"]),
    (["experiment=tiny_cpuu"], ["experiment = tiny_cpuu", "nearest: tiny_cpu"]),
]


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["train.tokns=2M"], ["train.tokns", "train.tokens"]),
        (
            ["data=files", "data.train=[nowhere/text]", "data.tokenizer=nowhere"],
            ["data.train = nowhere/text", "no file nowhere/text.bin", "data.tokenizer = nowhere"],
        ),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_CONFIGS),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_a_config_that_cannot_run_is_refused(
    overrides: list[str], texts: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert_refused(train(run_dir, *overrides), run_dir, *texts)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    wrong = ("train.seed=-1", "modle.hidden_size=64", "schedule.peak_lr=fast", "checkpoint.keep=0")
    keys = ("train.seed", "modle.hidden_size", "schedule.peak_lr", "checkpoint.keep")
    assert_refused(train(run_dir, *wrong), run_dir, "4 problems in the configuration", *keys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_is_not_replaced_by_the_cpu_in_silence(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    finished = train(run_dir, f"data.folder={corpus}", "runtime.device=cuda")
    assert_refused(
        finished, run_dir, "runtime.device=cuda", "torch sees no GPU", "runtime.device=cpu"
    )


def test_a_truncated_index_is_refused(tmp_path: Path, corpus: Path) -> None:
    copy, run_dir = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus, copy)
    folder = copy / "vocab-512"
    whole = (folder / "train.idx").read_bytes()
    (folder / "train.idx").write_bytes(whole[: len(whole) // 2])
    before = contents(copy)
    for data in (
        [f"data.folder={copy}"],
        ["data=files", f"data.train=[{folder}/train]", f"data.tokenizer={folder}/tokenizer"],
    ):
        finished = train(run_dir, *data)
        assert_refused(
            finished, run_dir, f"{folder}/train.idx is truncated", "write the files anew"
        )
    assert contents(copy) == before


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear reader")
    finished = train(tmp_path, f"data.folder={corpus}")
    assert finished.code == 2
    assert f"{tmp_path} is not a run folder" in finished.err
    assert "run_dir=" in finished.err
    assert "Traceback" not in finished.said
    assert list(contents(tmp_path)) == ["letter.txt"]


def test_a_folder_that_may_not_be_written_is_refused_before_the_data_is_opened(
    tmp_path: Path,
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o555)
    script = str(ROOT / "tests" / "unprivileged.py")
    for run_dir in (closed / "run", closed):
        finished = finish(start_program(script, *arguments(run_dir)))
        assert finished.code == 2, finished.said
        text = f"run_dir = {run_dir}: this user may not read and write in {closed}"
        assert text in finished.err
        assert "Traceback" not in finished.said
        assert "train data" not in finished.said
        assert list(closed.iterdir()) == []


def test_a_run_that_was_killed_at_its_start_leaves_a_folder_for_another(
    tmp_path: Path, corpus: Path
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "attempts" / "0001").mkdir(parents=True)
    job = compose.compose("train", ["experiment=tiny_cpu", "train.seed=7"])
    frozen.freeze(job, run_dir)
    finished = train(run_dir, f"data.folder={corpus}", "train.tokens=512")
    assert finished.code == 0, finished.err
    said = f"nothing was trained in {run_dir}: this run takes the folder over"
    assert finished.err.count(said) == 1
    assert history.read(run_dir)[1]["event"] == "taken over"
    other = train(run_dir, f"data.folder={corpus}", "train.tokens=512", "train.seed=8")
    assert other.code == 2
    assert f"{run_dir} belongs to a run with another config" in other.err


def assert_told_once_and_last(finished: Finished, text: str) -> None:
    """Check that one process says it, and that torchrun ends its own report with it."""
    assert finished.code != 0
    said, report = finished.err.split("Root Cause (first observed failure):")
    assert said.count(text) == 1
    assert "traceback : hybrid-train: " in report
    assert report.count(text) == 1


def test_under_torchrun_a_wrong_config_is_told_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finished = train(run_dir, "train.tokns=2M", processes=2)
    assert_told_once_and_last(finished, "train.tokns = 2M: there is no such setting")
    assert not run_dir.exists()


@pytest.mark.slow
def test_under_torchrun_a_wrong_folder_is_told_once(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear reader")
    words = arguments(tmp_path, f"data.folder={corpus}", "parallel.tensor=2")
    finished = finish(start(*words, processes=2))
    assert_told_once_and_last(finished, f"{tmp_path} is not a run folder")
    assert list(contents(tmp_path)) == ["letter.txt"]


@pytest.mark.slow
def test_under_torchrun_an_id_beyond_the_vocabulary_is_told_once(
    tmp_path: Path, corpus: Path
) -> None:
    tokenizer = corpus / "vocab-512" / "tokenizer"
    prefix = write_stray(tmp_path / "a", 550, vocab_size=512)  # 512 rows a process, padded to 1,024
    data = ("data=files", f"data.train=[{prefix}]", f"data.tokenizer={tokenizer}")
    layout = ("parallel.tensor=2", "model.vocab_multiple=1024", "train.tokens=4096")
    finished = train(tmp_path / "run", *data, *layout, processes=2)
    assert finished.code != 0
    assert_told_once_and_last(
        finished, f"of {prefix} holds token 550 at place 40, but the vocabulary"
    )


def test_a_reader_that_has_had_enough_gets_no_traceback() -> None:
    command = f"{sys.executable} -m hybrid_train train experiment=tiny_cpu --cfg job | head -1"
    finished = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert "Traceback" not in finished.stderr
    assert finished.stdout.endswith(("\n0\n", "\n141\n"))


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_bytes_that_are_no_text_are_told_in_every_encoding(
    variables: dict[str, str], tmp_path: Path
) -> None:
    variables = variables or {"PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "hybrid_train", "generate", "checkpoint=x", b"prompt=\xff\xfe"]
    finished = subprocess.run(
        command, capture_output=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip
    assert finished.returncode == 2
    assert b"prompt = \\udcff\\udcfe: has bytes that are no text" in finished.stderr
    assert b"Traceback" not in finished.stderr
