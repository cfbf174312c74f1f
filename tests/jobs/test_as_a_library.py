"""One Python process that trains one run after another."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hybrid_train.jobs import train as train_job
from hybrid_train.schema.problems import UserError
from tests.jobs.command import arguments, finish, start_program, train, untimed
from tests.tiny import tiny_job

SCRIPT = str(Path(__file__).with_name("several_runs.py"))
SHORT = ("train.tokens=1k",)
OTHER = ("train.tokens=512", "model.pattern=M*E", "train.seed=7", "precision=fp8_blockwise")
COUNTED = ("precision.statistics_interval=1",)
WILD = (
    *("recovery.skip_nonfinite=false", "schedule.peak_lr=5", "optimizer.clip_grad_norm=0"),
    *("optimizer.weight_decay=1000", "model.init_std=10"),
)


@pytest.mark.slow
def test_every_run_of_a_process_is_what_it_is_alone(tmp_path: Path, corpus: Path) -> None:
    data = f"data.folder={corpus}"

    def run(name: str, *overrides: str) -> tuple[str, list[str]]:
        return "train", arguments(tmp_path / name, data, *overrides)[1:]

    text = [f"checkpoint={tmp_path}/first", "prompt=def", "max_new_tokens=3"]
    jobs = [
        run("first", *SHORT),
        ("generate", text),
        run("other", *OTHER, *COUNTED),
        run("fails", *SHORT, *WILD),
        run("again", *SHORT),
        run("other again", *OTHER, *COUNTED),
    ]
    finished = finish(start_program(SCRIPT, json.dumps(jobs)))
    assert finished.code == 0, finished.said
    assert finished.out.count("refused: step 3: loss is nan") == 1
    for name, words in (("again", SHORT), ("other again", (*OTHER, *COUNTED))):
        alone = tmp_path / f"{name} alone"
        assert train(alone, data, *words).code == 0
        assert untimed(tmp_path / name) == untimed(alone)
    assert untimed(tmp_path / "first") == untimed(tmp_path / "again")
    assert untimed(tmp_path / "other") == untimed(tmp_path / "other again")


@pytest.mark.slow
def test_processes_meet_again_for_every_run(tmp_path: Path, corpus: Path) -> None:
    layouts = {"split": "parallel.tensor=2", "staged": "parallel.pipeline=2"}
    layouts["split again"] = layouts["split"]
    words = (f"data.folder={corpus}", "train.tokens=512")
    jobs = [("train", arguments(tmp_path / name, *words, one)[1:]) for name, one in layouts.items()]
    finished = finish(start_program(SCRIPT, json.dumps(jobs), processes=2))
    assert finished.code == 0, finished.said
    assert untimed(tmp_path / "split") == untimed(tmp_path / "split again")
    assert len(untimed(tmp_path / "staged")) == 2


def test_a_run_in_another_thread_is_refused() -> None:
    with (
        ThreadPoolExecutor(1) as threads,
        pytest.raises(UserError, match="in its main thread alone"),
    ):
        threads.submit(train_job.run, tiny_job()).result()
