"""What lies beside tensors: read as plain data, closed to code."""

import argparse
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.nvidia import saved_state
from hybrid_train.schema.problems import UserError
from tests.core_save import namespace
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_arguments_are_read_as_a_dictionary() -> None:
    found = saved_state.read(saved({"args": namespace(), "iteration": 5}), "here")
    assert found["iteration"] == 5
    assert found["args"]["hidden_size"] == 32
    assert found["args"]["params_dtype"] == torch.float32


def test_numbers_that_are_tensors_come_as_numbers() -> None:
    found = saved_state.read(saved({"step": torch.tensor(7), "inner": [torch.tensor(0.5)]}), "here")
    assert found == {"step": 7, "inner": [0.5]}


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "in the arguments"])
def test_code_is_refused_by_its_name_and_not_run(tmp_path: Path, inside: bool) -> None:
    evil = Evil(tmp_path / "made")
    content = {"args": argparse.Namespace(spec=evil)} if inside else {"args": 1, "other": evil}
    with pytest.raises(UserError, match=r"common.pt asks for posix\.mkdir") as error:
        saved_state.read(saved(content), "common.pt")
    assert "a pickle can run code" in str(error.value)
    assert not (tmp_path / "made").exists()


def test_a_pickle_without_an_archive_is_no_way_in(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        saved_state.read(pickle.dumps(Evil(tmp_path / "made")), "common.pt")
    assert not (tmp_path / "made").exists()


def test_an_admitted_name_does_not_reach_the_class_itself(tmp_path: Path) -> None:
    from signal import Signals

    content = saved({"a": Path("x"), "b": Signals.SIGTERM, "c": 1})
    with torch.serialization.safe_globals([type(Path()), Signals]):  # as core does, imported
        found = saved_state.read(content, "here")
        assert type(Path()) in torch.serialization.get_safe_globals()
    assert found["c"] == 1
    assert not isinstance(found["a"], Path)


def test_all_that_megatron_core_admits_is_admitted() -> None:
    from megatron.core.safe_globals import SAFE_GLOBALS

    names = {f"{one.__module__}.{one.__qualname__}" for one in SAFE_GLOBALS}
    assert names - {"argparse.Namespace"} <= set(saved_state.ADMITTED)


@pytest.mark.parametrize("length", [0, 10, 300])
def test_a_damaged_file_is_said_to_be(length: int) -> None:
    with pytest.raises(UserError, match=r"common.pt is damaged"):
        saved_state.read(saved({"iteration": 5})[:length], "common.pt")


@pytest.mark.parametrize("value", ["5", -1, 2.5, [3]])
def test_a_count_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="must be a whole number"):
        saved_state.whole_number({"iteration": value}, "iteration", "here")
    assert saved_state.whole_number({}, "iteration", "here") == 0
    assert saved_state.whole_number({"step": 3.0}, "step", "here") == 3


@pytest.mark.parametrize(
    ("common", "steps"),
    [
        ({"optimizer": {"optimizer": {"param_groups": [{"lr": 1.0, "step": 9}]}}}, 9),
        ({"optimizer": {"state": {"common_step": 9.0}, "param_groups": [{"lr": 1.0}]}}, 9),
        ({"optimizer": {0: {"optimizer": {"param_groups": [{"step": 9}]}}, 1: {}}}, 9),
        ({"optimizer_states": {"state": {"common_step": 9.0}}}, 9),
        ({"opt_param_scheduler": {"step": 9}}, None),
    ],
    ids=["groups", "beside them", "chained", "NeMo", "none"],
)
def test_the_steps_of_the_optimizer_are_found(common: dict[str, Any], steps: int | None) -> None:
    assert saved_state.optimizer_steps(common) == steps


def test_a_list_that_holds_itself_is_damaged() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UserError, match="is damaged"):
        saved_state.read(saved({"iteration": endless}), "common.pt")


@pytest.mark.parametrize("steps", [float("nan"), -3, True])
def test_steps_of_an_optimizer_that_are_no_count_are_refused(steps: object) -> None:
    state = {"optimizer": {"param_groups": [{"step": steps}]}}
    with pytest.raises(UserError, match="must be a whole number"):
        saved_state.optimizer_steps(state)
