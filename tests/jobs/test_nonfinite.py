"""A number that is no longer finite stops the run and says where it came from."""

from pathlib import Path

import pytest
import torch

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

SCRIPT = str(Path(__file__).with_name("poisoned.py"))


def test_a_learning_rate_that_explodes_stops_the_run_which_goes_on_from_a_good_checkpoint(
    tmp_path: Path, corpus: Path
) -> None:
    run_dir, data = tmp_path / "run", f"data.folder={corpus}"
    # The rate of the first step is 0, so the weights explode in the second and the third stops.
    wild = ("optimizer.clip_grad_norm=0", "schedule.peak_lr=1e30")
    keep = ("checkpoint.interval=1", "checkpoint.keep=5")
    finished = train(run_dir, data, *wild, *keep)
    assert finished.code == 2
    assert "step 3: loss is nan; first in the forward pass on rank 0, module " in finished.err
    assert "the last checkpoint is good" in finished.err
    assert "checkpoint.load=" in finished.err
    assert "Traceback" not in finished.said
    assert checkpoints(run_dir) == ["step_00000001", "step_00000002"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(run_dir, 2).values())

    calmer = tmp_path / "calmer"
    load = f"checkpoint.load={run_dir}/checkpoints/step_00000001"
    again = train(calmer, data, load)
    assert again.code == 0, again.err
    assert [line["step"] for line in metrics(calmer)] == list(range(2, 11))


def test_the_rank_and_the_module_where_it_began_are_named(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv("POISON", "4:1:decoder.layers.3.mlp.linear_fc1.weight")
    words = arguments(
        run_dir, f"data.folder={corpus}", "parallel.tensor=2", "checkpoint.interval=2"
    )
    finished = finish(start_program(SCRIPT, *words, processes=2))
    assert finished.code != 0
    message = "step 4: loss is nan; first in the forward pass on rank 1, module "
    assert finished.err.count(message) == 1
    assert f"{message}decoder.layers.3.mlp.linear_fc1" in finished.err
    assert checkpoints(run_dir) == ["step_00000002"]
