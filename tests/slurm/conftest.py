"""A cluster for the tests of this folder, where SLURM is installed."""

from collections.abc import Iterator

import pytest

from tests.jobs.conftest import corpus as corpus
from tests.slurm import cluster as slurm


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[slurm.Cluster]:
    """A cluster that tracks processes as the module says in PROCTRACK."""
    reason = slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    with slurm.running(folder, request.module.PROCTRACK) as started:
        yield started
