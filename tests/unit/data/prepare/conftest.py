"""Workers that are forked from a process which has their imports; tests/jobs starts them anew."""

import multiprocessing

import pytest

from tests.distributed import launch


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: launch.FORKED)
