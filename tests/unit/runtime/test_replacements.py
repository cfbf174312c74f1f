"""Names of other libraries are replaced in one way, and what was read for it is compared."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from hybrid_train.runtime import replacements
from hybrid_train.runtime.replacements import Replacement, source_digest, to_do

SOURCE = '''
"""A library."""
try:
    import fast
    def multiply(x, y):
        """Multiply fast."""
        return fast.multiply(x, y)
except ImportError:
    def multiply(x, y):
        return x * y  # slow

class Layer:
    def forward(self, x):
        return multiply(x, 2)
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_library").mkdir()
    file = tmp_path / "their_library" / "__init__.py"
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop("their_library", None)


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    replacements._tree.cache_clear()
    replacements._file_of.cache_clear()


def row(**read: str) -> Replacement:
    return Replacement("their_library", ("multiply", "Layer.forward"), "it is slow", read)


def test_ours_stand_for_functions_and_methods(library: Path) -> None:
    row().put(multiply=lambda x, y: "ours", Layer__forward=lambda self, x: "ours, too")
    import their_library

    assert their_library.multiply(2, 3) == "ours"
    assert their_library.Layer().forward(2) == "ours, too"


def test_a_name_that_is_gone_is_not_invented(library: Path) -> None:
    library.write_text(SOURCE.replace("def forward", "def run"))
    with pytest.raises(AssertionError, match=r"their_library has no Layer\.forward any more"):
        row().put(multiply=None, Layer__forward=None)


def test_all_names_of_a_row_are_replaced_or_none(library: Path) -> None:
    with pytest.raises(AssertionError, match="Layer__forward"):
        row().put(multiply=None)


def test_what_was_read_and_is_the_same_is_not_to_be_read_again(library: Path) -> None:
    digest = source_digest("their_library", "Layer.forward")
    # Comments, docstrings and layout may change.
    library.write_text(SOURCE.replace("# slow", "# is slow").replace("Multiply fast", "Be fast"))
    assert to_do([row(**{"Layer.forward": digest})]) == []
    assert "their_library" not in sys.modules


@pytest.mark.parametrize(
    ("old", "new"),
    [("multiply(x, 2)", "multiply(x, 3)"), ("x * y", "y * x"), ("fast.multiply(x, y)", "x @ y")],
    ids=["a method", "a definition without a library", "one with it"],
)
def test_what_has_changed_is_to_be_read_again(library: Path, old: str, new: str) -> None:
    names = ("multiply", "Layer.forward")
    read = {name: source_digest("their_library", name) for name in names}
    nothing_remembered.__wrapped__()
    library.write_text(SOURCE.replace(old, new))
    (line,) = to_do([row(**read)])
    name = "Layer.forward" if "2" in old else "multiply"
    assert line.startswith(f"their_library:{name} is ")
    assert f"was {read[name]}; read it again: it is slow" in line


def test_what_is_gone_is_said(library: Path) -> None:
    (line,) = to_do([row(**{"Layer.backward": "0123456789ab"})])
    assert line.startswith("their_library:Layer.backward is gone, was 0123456789ab")


def test_a_library_that_is_not_installed_has_nothing_to_read() -> None:
    assert to_do([Replacement("no_such_library.part", (), "", {"run": "0123456789ab"})]) == []


def test_a_module_is_found_without_its_package_being_run() -> None:
    assert isinstance(sys, ModuleType)
    assert source_digest("torch.distributed.distributed_c10d", "all_reduce")
    assert not source_digest("torch.distributed.distributed_c10d", "no_such_function")
