"""The layout rules that neither ruff nor the import linter can check."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from hybrid_train.config.commands import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hybrid_train"
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
TEXT_SUFFIXES = {
    ".py",
    ".md",
    ".yaml",
    ".toml",
    ".txt",
    ".sh",
    ".cfg",
    ".in",
    ".env",
    ".sbatch",
    "",
}
TOP_LEVEL = ("hybrid_train", "conf", "launch", "data_tools", "docker", "docs", "tests", ".ci")
# A folder of somebody's machine, or of root's; built so that this file does not contain one.
HOME_PATH = re.compile("|".join(f"/{home}/" for home in ("home", "Users", "root")))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_files() -> list[Path]:
    """Text files that belong to the project: the top level, and everything below its folders."""
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in TOP_LEVEL:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    ours = [path for path in files if "__pycache__" not in path.parts and path.name != ".git"]
    return sorted(path for path in ours if path.suffix in TEXT_SUFFIXES)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=name_of)
def test_a_package_file_is_a_docstring_that_says_what_is_not_here(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    if path.parent == PACKAGE:
        (version,) = (ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign))
        assert version == "__version__"
        body = [node for node in body if not isinstance(node, ast.Assign)]
    assert len(body) == 1, "an __init__.py holds its docstring and nothing else"
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "the docstring is missing"
    if path.parent != PACKAGE:
        assert "Not here:" in docstring, "say what does not belong here, and where it is"


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_no_file_is_a_drawer() -> None:
    names = [path for path in PACKAGE.rglob("*") if path.suffix in {".py", ""}]
    drawers = [path for path in names if BANNED_NAMES & set(path.stem.split("_"))]
    assert not [name_of(path) for path in drawers], "name the subject"


def test_imports_are_absolute() -> None:
    relative = [
        f"{name_of(path)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert not relative


def modules_below(package: Path) -> list[str]:
    files = sorted(package.rglob("*.py"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [module.removesuffix(".__init__") for module in modules]


def imported_with(modules: Iterable[str]) -> set[str]:
    """Return all that a fresh process has imported after these modules."""
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {sorted(modules)}]; "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "modules",
    [
        modules_below(PACKAGE / "config"),
        ["hybrid_train.anatomy.counts"],
        ["hybrid_train.optim.schedules"],
    ],
    ids=["config", "anatomy.counts", "optim.schedules"],
)
def test_import_needs_neither_torch_nor_megatron(modules: list[str]) -> None:
    libraries = {"torch", "megatron", "transformer_engine"}
    assert libraries.isdisjoint(imported_with(modules))


def test_no_job_imports_megatron_before_its_process_is_set_up() -> None:
    """On a CPU torch.compile must have been replaced by then, or the first step takes a minute."""
    assert "megatron.core" not in imported_with({one.module for one in COMMANDS.values()})


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = [
        f"{name_of(path)}: {line}"
        for path in text_files()
        for line in path.read_text().splitlines()
        if HOME_PATH.search(line)
    ]
    assert not found
