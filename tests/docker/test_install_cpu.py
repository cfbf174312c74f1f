"""The steps of the CPU image in a fresh environment, as an engine would run them.

It installs from the package index, for some minutes, so it runs where it is asked for: `.ci/run`
does.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hybrid_train.config.supported import plain_name
from tests.docker.programs import setup_words

ASKED = "HYBRID_TRAIN_INSTALL"
TIMEOUT_S = 1800  # a slow network, 3 GB

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get(ASKED) != "1",
        reason=f"{ASKED}=1 makes a fresh environment, for some minutes",
    ),
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the environment goes; gigabytes, so they do not stay as other temporary files do."""
    yield tmp_path / "venv"
    shutil.rmtree(tmp_path / "venv", ignore_errors=True)


def test_the_steps_of_the_cpu_image_give_one_that_trains(folder: Path, source_copy: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", str(source_copy / "docker" / "install_cpu.sh"), str(folder)],
        env={**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    told = {line.split()[0] for line in lines}
    needed = [Requirement(line).name for line in setup_words()["install_requires"]]
    assert set(map(plain_name, needed)) <= told
    assert "data=streams train.tokens=2k run_dir=run: exit code 0" in done.stdout
    assert lines[-1] == "The cpu image holds what it promises."
