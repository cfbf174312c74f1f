"""Which process this is, and environments in which it can be none."""

import pytest

from hybrid_train.config import launcher
from hybrid_train.schema.problems import UserError

TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TORCHRUN = {**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any launcher."""
    for name in (*launcher.NAMES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def fill(environment: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    "values",
    [
        {"MASTER_ADDR": "login1"},
        {"MASTER_ADDR": "login1", "MASTER_PORT": "not looked at"},
        {"RANK": "0"},
        {"RANK": "", "WORLD_SIZE": " ", "LOCAL_RANK": ""},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    ],
    ids=str,
)
def test_what_says_nothing_of_others_is_one_process(
    values: dict[str, str], environment: pytest.MonkeyPatch
) -> None:
    fill(environment, values)
    launcher.require_sound()
    assert (launcher.rank(), launcher.world_size()) == (0, 1)
    assert launcher.unused() == [name for name in launcher.NAMES if name in values]


@pytest.mark.parametrize("values", [TWO, {**TWO, "LOCAL_RANK": "1"}, TORCHRUN], ids=len)
def test_whole_sets_are_several_processes(
    values: dict[str, str], environment: pytest.MonkeyPatch
) -> None:
    fill(environment, values)
    launcher.require_sound()
    assert (launcher.rank(), launcher.world_size()) == (1, 2)
    assert launcher.meeting_point() == ("localhost", "29500")
    assert launcher.unused() == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"RANK": "one"}, "RANK = one is no whole number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE = 2.0 is no whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0 must be at least 1"),
        ({"RANK": "1"}, "RANK = 1 makes this one of several processes, but WORLD_SIZE is not set"),
        ({"RANK": "-1"}, "RANK = -1"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK = 3"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE = 8 must lie between 1 and WORLD_SIZE (1)"),
        ({**TWO, "RANK": "2"}, "RANK = 2 makes this one of several processes, but WORLD_SIZE is 2"),
        ({**TWO, "RANK": ""}, "WORLD_SIZE = 2 says that this is one of 2 processes, but RANK is"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT are not set"),
        ({**TWO, "MASTER_PORT": "70000"}, "MASTER_PORT = 70000 must lie between 1 and 65535"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT = http is no whole number"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(
    values: dict[str, str], text: str, environment: pytest.MonkeyPatch
) -> None:
    fill(environment, values)
    with pytest.raises(UserError) as refusal:
        launcher.require_sound()
    assert text in str(refusal.value)
    set_here = " ".join(name for name in launcher.NAMES if name in values)
    assert f"start with torchrun for several processes, or unset {set_here} for one" in str(
        refusal.value
    )


def test_a_job_of_one_process_is_refused_where_there_are_several(
    environment: pytest.MonkeyPatch,
) -> None:
    launcher.require_alone("generate")
    fill(environment, TORCHRUN)
    with pytest.raises(UserError, match="generate runs in one process, and this is one of 2"):
        launcher.require_alone("generate")
