"""Libraries are imported elsewhere: one that ends its process does not end ours."""

import os
from pathlib import Path

import pytest

from hybrid_train.runtime.health import probe
from hybrid_train.runtime.optional import State

MODULES = {
    "sound_part": "answer = 42\nprint('chatter on stdout')\n",
    "failing_part": "raise OSError('undefined symbol: _ZN3c10')\n",
    "crashing_part": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
    "leaving_part": "import sys\nsys.stderr.write('licence expired\\n')\nsys.exit(7)\n",
    "hanging_part": "import time\ntime.sleep(600)\n",
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the modules on the path of other processes, under names that the table knows."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    table = "\n".join(
        f"optional.LIBRARIES[{name!r}] = optional.OptionalLibrary({name!r}, 'pip install x')"
        for name in (*MODULES, "absent_part")
    )
    (tmp_path / "sitecustomize.py").write_text(
        f"from hybrid_train.runtime import optional\n{table}\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[4])])
    monkeypatch.setenv("PYTHONPATH", path)


def test_each_state_is_told_apart() -> None:
    found = probe.libraries(["sound_part", "failing_part", "absent_part"])
    assert {name: library.state for name, library in found.items()} == {
        "sound_part": State.working,
        "failing_part": State.broken,
        "absent_part": State.absent,
    }
    assert found["failing_part"].error == "OSError: undefined symbol: _ZN3c10"


def test_a_library_that_ends_its_process_is_broken_and_the_rest_are_still_tried() -> None:
    found = probe.libraries(["crashing_part", "sound_part", "leaving_part", "failing_part"])
    assert found["crashing_part"].error == "the import ended the process: signal SIGSEGV"
    assert (
        found["leaving_part"].error == "the import ended the process: exit code 7, licence expired"
    )
    assert found["sound_part"].state is State.working
    assert found["failing_part"].error == "OSError: undefined symbol: _ZN3c10"


def test_a_library_that_hangs_is_broken() -> None:
    found = probe.libraries(["hanging_part"], limit_s=3)
    assert found["hanging_part"].error == "the import ended the process: no answer within 3 s"


def test_torch_tells_what_it_is_built_with() -> None:
    import torch

    found = probe.libraries(["torch"])["torch"]
    assert found.version == torch.__version__.partition("+")[0]
    assert found.facts["cuda"] == torch.version.cuda
    assert len(found.facts["devices"]) == (
        torch.cuda.device_count() if torch.cuda.is_available() else 0
    )
