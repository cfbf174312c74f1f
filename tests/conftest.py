"""What holds for every test: one thread per worker, fixed seeds, GPU tests only beside a GPU."""

import copy
import importlib
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch and numpy are imported: workers would fight for the cores otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test module may import Megatron before the emulation of a device is in place; its small helpers
# would then be compiled on first use, for many seconds.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs", "quickstart", ".*_cache"
)

# The same examples in every run, and no deadline: a busy machine must not fail a test.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where torch sees no CUDA device; torch is imported only for them."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not importlib.import_module("torch").cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed every generator in use: a test sees the same numbers alone and in a suite."""
    random.seed(1234)
    np.random.seed(1234)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1234)


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """Take back how a run speaks: messages of later tests would not reach pytest."""
    yield
    logger = logging.getLogger("hybrid_train")
    logger.propagate, logger.handlers = True, []
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def compositions_kept() -> Iterator[None]:
    """Let Hydra compose the same choices of the same files once; that is most of what a job costs.

    Files count as the same by their sizes and times. What one test does to a config, no other sees.
    """
    from hybrid_train.config import compose

    plain = compose.hydra_compose
    kept: dict[tuple[Any, ...], Any] = {}

    def composed(job_name: str, choices: list[str]) -> Any:
        loader = compose.GlobalHydra.instance().config_loader()
        key = (job_name, *choices, *map(file_of, yaml_files(loader)))
        if key not in kept:
            kept[key] = plain(job_name, choices)
        return copy.deepcopy(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "hydra_compose", composed)
        yield


def yaml_files(loader: Any) -> list[Path]:
    """List the files that a composition may read."""
    parts = loader.get_search_path().get_path()
    places = [Path(part.path.removeprefix("file://")) for part in parts]
    return [file for place in places for file in sorted(place.rglob("*.yaml"))]


def file_of(path: Path) -> tuple[str, int, int]:
    """Tell a file from what it was before."""
    seen = path.stat()
    return str(path), seen.st_size, seen.st_mtime_ns


@pytest.fixture(scope="session")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree that a test may build and run in."""
    copy = tmp_path_factory.mktemp("source") / "hybrid_train"
    if not (ROOT / ".git").exists():  # an unpacked source distribution
        return Path(shutil.copytree(ROOT, copy, ignore=NOT_SOURCE))
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # git still lists a file that was deleted and not committed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy
