"""What a number that is no longer finite does to a run, and where it came from."""

from pathlib import Path

import pytest
import torch

from hybrid_train.tracking import history
from tests.jobs.command import (
    arguments,
    checkpoints,
    finish,
    metrics,
    start_program,
    tensors,
    train,
)

pytestmark = pytest.mark.xdist_group("nonfinite")

STOP = ("recovery.skip_nonfinite=false",)
# At the limits of all of these, one update makes weights that overflow in the next step.
WILD = (
    *("schedule.peak_lr=5", "optimizer.weight_decay=1000", "optimizer.clip_grad_norm=0"),
    "model.init_std=10",
)
SCRIPT = str(Path(__file__).with_name("poisoned.py"))


@pytest.mark.slow
def test_a_learning_rate_that_explodes_stops_the_run_which_goes_on_from_a_good_checkpoint(
    tmp_path: Path, corpus: Path
) -> None:
    run_dir, data = tmp_path / "run", f"data.folder={corpus}"
    # The rate of the first step is 0, so the weights explode in the second and the third stops.
    keep = ("checkpoint.interval=1", "checkpoint.keep=5")
    finished = train(run_dir, data, *WILD, *STOP, *keep)
    assert finished.code == 2
    assert "step 3: loss is nan; first in the forward pass on rank 0, module " in finished.err
    assert "; learning rate 5; tokens 512 to 768" in finished.err
    assert "the checkpoints are as they were" in finished.err
    assert f"checkpoint.load={run_dir}/checkpoints/step_00000002" in finished.err
    assert "Traceback" not in finished.said
    assert checkpoints(run_dir) == ["step_00000001", "step_00000002"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(run_dir, 2).values())

    calmer = tmp_path / "calmer"
    load = f"checkpoint.load={run_dir}/checkpoints/step_00000001"
    again = train(calmer, data, load, "model.init_std=10")
    assert again.code == 0, again.err
    assert [line["step"] for line in metrics(calmer)] == list(range(2, 11))


@pytest.mark.slow
def test_the_rank_and_the_module_where_it_began_are_named(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv("POISON", "4:1:decoder.layers.3.mlp.linear_fc1.weight")
    words = arguments(
        run_dir, f"data.folder={corpus}", "parallel.tensor=2", "checkpoint.interval=2", *STOP
    )
    finished = finish(start_program(SCRIPT, *words, processes=2))
    assert finished.code != 0
    message = "step 4: loss is nan; first in the forward pass on rank 1, module "
    said, _ = finished.err.split("Root Cause (first observed failure):")  # torchrun says it again
    assert said.count(message) == 1
    module = "decoder.layers.3.mlp.linear_fc1 (its weight not finite)"
    assert f"{message}{module}" in finished.err
    assert checkpoints(run_dir) == ["step_00000002"]


def test_bad_steps_are_skipped_and_after_a_row_of_them_the_run_goes_back_to_good_weights(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv("POISON", "4:0:decoder.layers.3.mlp.linear_fc1.weight")
    settings = ("checkpoint.interval=2", "recovery.rollback_after=2", f"data.folder={corpus}")
    finished = finish(start_program(SCRIPT, *arguments(run_dir, *settings)))
    assert finished.code == 0, finished.err
    assert "step 4 was skipped: loss is nan; first in the forward pass on rank 0" in finished.said
    assert "back to the weights of step 2; the batches of steps 4 to 5 are left" in finished.said
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines if line.get("skipped")] == [4, 5]
    assert [line["loss"] for line in lines if line.get("skipped")] == [None, None]
    told = [(one["event"], one["step"]) for one in history.read(run_dir)[1:-1]]
    assert told == [("skipped", 4), ("skipped", 5), ("rolled back", 5)]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(run_dir, 10).values())


@pytest.mark.slow
def test_a_run_that_going_back_does_not_help_ends_and_says_so(tmp_path: Path, corpus: Path) -> None:
    run_dir, data = tmp_path / "run", f"data.folder={corpus}"
    recovery = ("recovery.rollback_after=1", "recovery.max_rollbacks=2")
    keep = ("checkpoint.interval=1", "checkpoint.keep=5")
    finished = train(run_dir, data, *WILD, *recovery, *keep)
    assert finished.code == 2
    assert "after 2 rollbacks in a row. Nothing was updated, so the checkpoints" in finished.err
    assert f"checkpoint.load={run_dir}/checkpoints/step_" in finished.err
    assert "Traceback" not in finished.said
    last = history.attempts(history.read(run_dir))[-1]
    assert (last.outcome, last.kind) == (history.FAILED, "nonfinite")


@pytest.mark.parametrize(
    "settings", [STOP, pytest.param(("recovery.rollback_after=1",), marks=pytest.mark.slow)]
)
def test_without_a_checkpoint_none_is_promised(
    settings: tuple[str, ...], tmp_path: Path, corpus: Path
) -> None:
    words = (f"data.folder={corpus}", *WILD, "checkpoint.interval=100", *settings)
    finished = train(tmp_path / "run", *words)
    assert finished.code == 2
    assert "step 3: loss is nan; first in the forward pass on rank 0, module " in finished.err
    assert "learning rate 5" in finished.err
    assert "There is no checkpoint to go on from: start in another folder" in finished.err
    for promise in ("checkpoints are", "is good", "checkpoint.load"):
        assert promise not in finished.err
