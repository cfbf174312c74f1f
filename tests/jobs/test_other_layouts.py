"""A run of one process goes on under torchrun with two, and with MTP or without."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.jobs.command import Finished, checkpoints, metrics, train

pytestmark = pytest.mark.xdist_group("train")

Run = tuple[Path, Finished]
# The same float32 terms in another order: rows of at most 512 (the logits) in 6 layers; a sum of K
# terms is off by a walk of K half ulps: sqrt(6 * 512) / 2, about 28 ulps.
ROUNDING = 28 * torch.finfo(torch.float32).eps
FROM, TO = 20, 24  # steps of the long run: where the copy of it stops, and how far it goes on


def stopped_at(source: Path, run_dir: Path, step: int) -> Path:
    """Copy a run as it was when it had saved a step, and no later one."""
    shutil.copytree(source, run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return run_dir


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        pytest.param(["parallel.tensor=2"], "tensor=2", marks=pytest.mark.slow),
        pytest.param(
            ["train.microbatch=1", "parallel.distributed_optimizer=false"],
            "data=2 distributed_optimizer=0",
            marks=pytest.mark.slow,
        ),
        (["parallel.pipeline=2", "model.pattern=ME|*-/*E"], "pipeline=2"),
    ],
)
def test_two_processes_go_on_where_one_stopped(
    overrides: list[str], words: str, long_run: Run, steady: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = stopped_at(long_run[0], tmp_path / "run", FROM)
    command = (*steady, f"train.tokens={TO * 256}", *overrides)
    finished = train(run_dir, *command, processes=2)
    assert finished.code == 0, finished.err
    assert f"going on from {run_dir}/checkpoints/step_000000{FROM}" in finished.said
    assert f"going on under {words}, saved under 1 process" in finished.said
    assert checkpoints(run_dir)[-1] == f"step_000000{TO}"
    mine, theirs = metrics(run_dir), metrics(long_run[0])[:TO]
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for line, reference in zip(mine, theirs, strict=True):
        for name in ("loss", "mtp_loss_1"):
            assert line[name] == pytest.approx(reference[name], rel=ROUNDING)


@pytest.mark.slow
def test_a_run_goes_on_without_mtp_and_says_so(
    long_run: Run, steady: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    given = f"checkpoint.load={long_run[0]}/checkpoints/step_000000{FROM}"
    command = (*steady, f"train.tokens={(FROM + 1) * 256}", "model.pattern=ME*-")
    finished = train(run_dir, *command, given)
    assert finished.code == 0, finished.err
    assert "not in the model, dropped with their moments: mtp.layers.0" in finished.said
    (line,) = metrics(run_dir)
    reference = metrics(long_run[0])[FROM]
    assert line["loss"] == pytest.approx(reference["loss"], rel=ROUNDING)
    assert "mtp_loss_1" not in line
