"""A run that begins with a checkpoint of another run."""

from pathlib import Path

import pytest
import torch

from tests.jobs.command import Finished, checkpoints, contents, metrics, tensors, train
from tests.jobs.conftest import STEPS

pytestmark = pytest.mark.xdist_group("train")

Run = tuple[Path, Finished]


def test_a_loaded_checkpoint_goes_on_at_its_position(
    long_run: Run, steady: tuple[str, ...], tmp_path: Path
) -> None:
    source, run_dir = long_run[0], tmp_path / "onward"
    before = contents(source)
    given = f"checkpoint.load={source}/checkpoints/step_00000020"
    finished = train(run_dir, *steady, f"train.tokens={30 * 256}", given)
    assert finished.code == 0, finished.err
    assert [line["step"] for line in metrics(run_dir)] == list(range(21, 31))
    assert checkpoints(run_dir) == ["step_00000030"]
    assert contents(source) == before
    mine, theirs = tensors(run_dir, 30), tensors(source, 30)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_loaded_weights_begin_a_run_of_their_own(
    long_run: Run, steady: tuple[str, ...], tmp_path: Path
) -> None:
    source, run_dir = long_run[0], tmp_path / "fresh"
    words = (f"checkpoint.load={source}", "checkpoint.load_only=weights")
    still = ("train.tokens=512", "schedule.peak_lr=0", "train.validate_start=true")
    finished = train(run_dir, *steady, *still, *words)
    assert finished.code == 0, finished.err
    assert f"starting from the weights of {source}/checkpoints/step_000000{STEPS}" in finished.said
    mine = metrics(run_dir)
    assert [line["step"] for line in mine] == [1, 2]
    # At a rate of 0 only the expert biases move, by 1e-3 a step, which hardly changes routing.
    learned = metrics(source)[-1]["validation_loss"]
    assert mine[-1]["validation_loss"] == pytest.approx(learned, abs=5e-3)
    assert mine[0]["start_validation_loss"] == pytest.approx(learned, abs=1e-6)
    assert "start_validation_loss" not in mine[1]
    assert mine[0]["loss"] < metrics(source)[0]["loss"] - 0.5
    moments = [t for name, t in tensors(run_dir, 2).items() if ".exp_avg." in name]
    old = [t for name, t in tensors(source, STEPS).items() if ".exp_avg." in name]
    assert moments
    assert not any(torch.equal(a, b) for a, b in zip(moments, old, strict=True))
