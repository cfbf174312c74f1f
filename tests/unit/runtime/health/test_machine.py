"""The machine itself: commands that answer, fail, hang, or are not there; files; hidden GPUs."""

import sys
from pathlib import Path

import pytest

from hybrid_train.runtime.health import machine
from hybrid_train.runtime.health.machine import (
    Answer,
    Machine,
    ask,
)
from tests.unit.runtime.health.machines import cpu_machine, gpu_machine, put


def python(code: str) -> Answer | None:
    return ask([sys.executable, "-c", code])


def test_a_command_answers_with_its_code_and_what_it_said() -> None:
    assert python("print('one'); print('two')") == Answer(0, "one\ntwo")
    failed = python("import sys; sys.exit('no such device')")
    assert failed == Answer(1, "no such device")
    assert (failed.first_line, Answer(1, "").first_line) == ("no such device", "it says nothing")


def test_a_command_that_is_not_there_has_no_answer() -> None:
    assert ask(["no-such-command-of-any-cluster"]) is None


def test_a_command_that_hangs_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "COMMAND_S", 0.2)
    assert python("import time; time.sleep(60)") == Answer(124, "no answer within 0.2 s")


def test_files_are_read_below_the_root(tmp_path: Path) -> None:
    put(tmp_path, "proc/version", "Linux\n")
    made_up = cpu_machine(tmp_path)
    assert made_up.text("proc/version") == "Linux"
    assert made_up.text("proc/other") is None
    assert made_up.exists("proc")
    assert Machine(libraries={}).text("proc/self/cgroup") is not None


def test_gpus_are_used_unless_they_are_hidden(tmp_path: Path) -> None:
    assert not cpu_machine(tmp_path / "cpu").uses_gpus
    for value, used in {"0,1": True, "": False, "-1": False}.items():
        node = gpu_machine(tmp_path / "gpu", environment={"CUDA_VISIBLE_DEVICES": value})
        assert (node.has_driver, node.uses_gpus) == (True, used)
    assert gpu_machine(tmp_path / "gpu").uses_gpus
