"""Which process this is."""

import pytest

from hybrid_train.runtime import ranks
from hybrid_train.runtime.start import process
from tests.tiny import RUNTIME


def test_a_process_alone_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.local_rank()) == (0, 0)
    assert (ranks.world_size(), ranks.local_world_size()) == (1, 1)
    assert ranks.is_main()


def test_ranks_are_those_that_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert (ranks.rank(), ranks.local_rank()) == (5, 1)
    assert (ranks.world_size(), ranks.local_world_size()) == (8, 4)
    assert not ranks.is_main()


def test_main_process_sees_its_own_error() -> None:
    """tests/distributed/test_layouts.py looks at what the other processes see."""

    def work() -> None:
        raise FileNotFoundError("no such file")

    with process(RUNTIME, seed=1), pytest.raises(FileNotFoundError, match="no such file"):
        ranks.run_on_main_first(work)
