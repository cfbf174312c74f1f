"""Files and functions are small enough to be read at once, files large enough to be opened."""

import ast
from collections import Counter
from pathlib import Path

from tests.house import importers_of

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("hybrid_train", "launch", "data_tools", "docker", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
PACKAGE = [path for path in SOURCES if path.is_relative_to(ROOT / "hybrid_train")]
FILE_LINES = 500
USUAL_FILE_LINES = 400
SMALL_LINES = 40
SMALL_SHARE = 0.02  # of the files of the package; an `__init__.py` is a docstring
SINGLE_SHARE = 0.20  # of the modules: those that one other imports, and nobody else
FUNCTION_LINES = 60
USUAL_FUNCTION_LINES = 40
USUAL_SHARE = 0.95


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def function_lengths(path: Path) -> dict[str, int]:
    """Lines of each function of a file, its docstring and decorators not counted."""
    lengths = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                doc = node.body[0]
                assert doc.end_lineno is not None
                lines -= doc.end_lineno - doc.lineno + 1
            lengths[f"{name_of(path)}:{node.lineno} {node.name}"] = lines
    return lengths


def test_a_file_has_at_most_500_lines() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    long = {name: n for name, n in lengths.items() if n > FILE_LINES}
    assert not long, "split it by subject"


def test_95_percent_of_the_files_have_at_most_400_lines() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in PACKAGE}
    long = {name: n for name, n in lengths.items() if n > USUAL_FILE_LINES}
    assert len(long) <= (1 - USUAL_SHARE) * len(lengths), long


def test_few_files_are_splinters() -> None:
    with_code = [path for path in PACKAGE if path.name != "__init__.py"]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in with_code}
    small = {name: n for name, n in lengths.items() if n < SMALL_LINES}
    assert len(small) <= SMALL_SHARE * len(lengths), f"join what is of one subject: {small}"


def test_few_modules_serve_one_other_alone() -> None:
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE}
    importers = importers_of(ROOT, trees)
    single = [name for name, ones in importers.items() if len(ones) == 1]
    assert len(single) <= SINGLE_SHARE * len(importers), f"join what is of one subject: {single}"


def test_no_two_modules_have_one_name() -> None:
    """`schema` mirrors what the sections are for; elsewhere a name leads to one file."""
    names = Counter(path.stem for path in PACKAGE if path.parent.name != "schema")
    del names["__init__"]
    assert [name for name, count in names.items() if count > 1] == []


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {name: n for path in SOURCES for name, n in function_lengths(path).items()}
    assert not {name: n for name, n in lengths.items() if n > FUNCTION_LINES}


def test_95_percent_of_the_functions_fit_within_40_lines() -> None:
    lengths = {name: n for path in PACKAGE for name, n in function_lengths(path).items()}
    long = {name: n for name, n in lengths.items() if n > USUAL_FUNCTION_LINES}
    assert len(long) <= (1 - USUAL_SHARE) * len(lengths), long
