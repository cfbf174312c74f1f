"""The same run on two processes, under torchrun."""

from pathlib import Path
from signal import SIGTERM

import pytest

from tests.jobs.command import Finished, checkpoints, metrics, signal_at_step, train

pytestmark = pytest.mark.xdist_group("processes")

STEPS = 10
LOSSES = ("loss", "mtp_loss_1", "validation_loss", "unigram_loss")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("single") / "run"
    finished = train(run_dir, f"data.folder={corpus}", cold=True)
    assert finished.code == 0, finished.err
    return run_dir


@pytest.mark.parametrize(
    ("layout", "cold"),
    [
        ("parallel.tensor=2", True),
        ("parallel.expert=2", False),
        ("parallel.pipeline=2", False),
    ],
)
@pytest.mark.slow
def test_two_processes_reach_the_losses_of_one(
    layout: str, cold: bool, single: Path, tmp_path: Path, corpus: Path
) -> None:
    run_dir = tmp_path / "run"
    finished = train(run_dir, f"data.folder={corpus}", layout, processes=2, cold=cold)
    assert finished.code == 0, finished.err
    assert_one_voice(finished, run_dir)
    mine, theirs = metrics(run_dir), metrics(single)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for line, reference in zip(mine, theirs, strict=True):
        assert line.keys() == reference.keys()
        # Sums in another order differ by float32 rounding, 1e-7 of a loss of 6. AdamW divides by
        # the root of the second moment: in the first steps a rounding of a near-zero gradient
        # moves its weight by up to the rate of 1e-3, hence the room.
        for name in LOSSES:
            if name in line:
                assert line[name] == pytest.approx(reference[name], abs=1e-3)
        assert line["lr"] == reference["lr"]


def assert_one_voice(finished: Finished, run_dir: Path) -> None:
    assert len(metrics(run_dir)) == STEPS
    assert finished.out.count("Where things lie:") == 1
    assert finished.err.count("train data:") == 1
    assert finished.err.count("Starting: hybrid-train train ") == 1
    assert "[rank 1]" not in finished.said


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_stops_all_processes(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    command = (f"data.folder={corpus}", "parallel.tensor=2", "train.tokens=20k")
    stopped = signal_at_step(SIGTERM, 3, run_dir, *command, processes=2)
    assert stopped.code != 0
    steps = len(metrics(run_dir))
    assert steps < 79  # of 20k tokens
    assert checkpoints(run_dir) == [f"step_{steps:08d}"]
    assert stopped.said.count("stopped by SIGTERM") == 1
