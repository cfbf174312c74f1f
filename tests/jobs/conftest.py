"""What the tests of whole jobs share: a small corpus and the finished run others compare with."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.jobs.command import ROOT, Finished, train

STEPS = 40  # of the long run; 256 tokens each
# Nothing in it depends on the length of training, so that a part of the run is a run.
STEADY = (
    "schedule=constant",
    "schedule.peak_lr=3e-3",
    "schedule.warmup_tokens=512",
    "train.validation_interval=20",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of one package of the standard library, with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("corpus")
    source = Path(sysconfig.get_path("stdlib")) / "email"
    command = [sys.executable, str(ROOT / "data_tools" / "build_quickstart.py")]
    command += ["--folder", str(folder), "--vocab-size", "512", "--source", str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={"PYTHONPATH": "."})
    return folder


@pytest.fixture(scope="session")
def steady(corpus: Path) -> tuple[str, ...]:
    """Overrides of a run that does not depend on its length."""
    return (f"data.folder={corpus}", *STEADY)


@pytest.fixture(scope="session")
def long_run(
    tmp_path_factory: pytest.TempPathFactory, steady: tuple[str, ...]
) -> tuple[Path, Finished]:
    """A run of 40 steps in one go, with a checkpoint every 10."""
    run_dir = tmp_path_factory.mktemp("runs") / "long"
    overrides = (*steady, f"train.tokens={STEPS * 256}")
    return run_dir, train(run_dir, *overrides, "checkpoint.interval=10", "checkpoint.keep=3")
