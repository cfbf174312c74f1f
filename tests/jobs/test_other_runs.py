"""A command that meets a run of another kind is refused, and that run stays as it was."""

from pathlib import Path

import pytest

from tests.jobs.command import Finished, contents, train

pytestmark = pytest.mark.xdist_group("train")

Run = tuple[Path, Finished]


def assert_refused(finished: Finished, *texts: str) -> None:
    assert finished.code == 2, finished.said
    assert "Traceback" not in finished.said
    for text in texts:
        assert text in finished.err


def test_a_checkpoint_of_another_model_is_refused(
    long_run: Run, steady: tuple[str, ...], tmp_path: Path
) -> None:
    source, run_dir = long_run[0], tmp_path / "run"
    words = (f"checkpoint.load={source}", "model.pattern=M-M", "model.hidden_size=32")
    assert_refused(
        train(run_dir, *steady, *words),
        f"checkpoint.load={source}",
        "model.pattern: ME*-/*E there, M-M here",
        "model.hidden_size: 64 there, 32 here",
    )
    assert not run_dir.exists()


def test_a_folder_of_another_run_is_refused_and_left_alone(
    long_run: Run, steady: tuple[str, ...]
) -> None:
    run_dir = long_run[0]
    before = contents(run_dir)
    assert_refused(
        train(run_dir, *steady, "optimizer.beta2=0.9", "train.seed=7"),
        f"{run_dir} belongs to a run with another config",
        "optimizer.beta2: 0.95 there, 0.9 here",
        "train.seed: 1234 there, 7 here",
        "Choose another run_dir=",
    )
    assert contents(run_dir) == before
