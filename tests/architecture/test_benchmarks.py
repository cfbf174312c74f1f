"""Programs that no test runs, and tests of GPUs, import nothing of ours that is gone."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROGRAMS = sorted(
    [*(TESTS / "benchmarks").glob("*.py"), *(TESTS / "gpu").rglob("*.py"), *TESTS.glob("*.py")]
)


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of each of our own that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
            ("hybrid_train", "tests")
        ):
            yield from ((str(node.module), one.name) for one in node.names)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_what_a_program_imports_is_there(path: Path) -> None:
    for module, name in imported(path):
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")
