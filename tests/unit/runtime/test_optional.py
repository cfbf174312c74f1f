"""Optional libraries: absent is fine, broken is an error that says what to do."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_train.runtime import optional
from hybrid_train.runtime.optional import OptionalLibrary, State, available, require, status
from hybrid_train.schema.problems import UserError


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Three libraries on the path: one that works, one that fails, one that is not there."""
    (tmp_path / "sound_kernels.py").write_text("answer = 42\n")
    (tmp_path / "broken_kernels.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("sound_kernels", "broken_kernels", "absent_kernels"):
        library = OptionalLibrary(name.replace("_", "-"), f"pip install {name}")
        monkeypatch.setitem(optional.LIBRARIES, name, library)
    status.cache_clear()
    yield
    sys.modules.pop("sound_kernels", None)
    status.cache_clear()


def test_each_state_is_told_apart() -> None:
    assert status("sound_kernels").state is State.working
    assert status("absent_kernels").state is State.absent
    assert status("broken_kernels").state is State.broken


def test_absent_is_no_and_not_an_error() -> None:
    assert available("sound_kernels")
    assert not available("absent_kernels")


@pytest.mark.parametrize("ask", [available, lambda name: require(name, "a feature")])
def test_a_broken_library_is_an_error_with_its_name_its_cause_and_the_fix(ask) -> None:
    with pytest.raises(UserError) as error:
        ask("broken_kernels")
    text = str(error.value)
    assert "broken_kernels is installed but cannot be imported" in text
    assert "OSError: undefined symbol: _ZN3c10" in text
    assert "pip install broken_kernels" in text
    assert "pip uninstall broken-kernels" in text


def test_a_missing_requirement_names_the_feature_and_the_fix() -> None:
    with pytest.raises(UserError, match="kernels=fused needs absent_kernels") as error:
        require("absent_kernels", "runtime.kernels=fused")
    assert "pip install absent_kernels" in str(error.value)


def test_a_working_requirement_is_returned() -> None:
    assert require("sound_kernels", "a feature").answer == 42


def test_status_reads_as_one_line() -> None:
    assert str(status("absent_kernels")) == "absent"
    assert str(status("broken_kernels")) == "broken (OSError: undefined symbol: _ZN3c10)"


def test_nothing_optional_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys; from hybrid_train.runtime import optional; "
        "sys.exit(any(name in sys.modules for name in optional.LIBRARIES))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
