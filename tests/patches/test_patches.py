"""What an addition takes: patches that add one thing each, applied to a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MOST_FILES = {"knob": 3, "command": 3, "objective": 4, "layer": 6}
BIN = Path(sys.executable).parent


def touched(name: str) -> list[str]:
    """Return the files that a patch changes or adds."""
    text = (Path(__file__).parent / f"{name}.patch").read_text()
    return re.findall(r"^\+\+\+ b/(.+)$", text, re.MULTILINE)


@pytest.fixture
def tree(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Copy what git knows of the tree, and apply the patch that the test is about."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    copy = tmp_path / "tree"
    for name in listed.stdout.splitlines():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target)
    patch = Path(__file__).parent / f"{request.param}.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=copy, check=True)
    return copy


def run(tree: Path, *command: str) -> str:
    """Run a command on the copy; return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("tree", "name"), [(name, name) for name in MOST_FILES], indirect=["tree"])
def test_an_addition_touches_few_files_and_passes_lint_and_its_tests(tree: Path, name: str) -> None:
    files = touched(name)
    assert len(files) <= MOST_FILES[name], files
    run(tree, str(BIN / "ruff"), "check")
    run(tree, str(BIN / "ruff"), "format", "--check")
    run(tree, str(BIN / "lint-imports"), "--no-logo")
    run(tree, str(BIN / "mypy"))
    tests = [one for one in files if one.startswith("tests/")]
    run(tree, str(BIN / "pytest"), "-q", "-p", "no:cacheprovider", "tests/architecture", *tests)


@pytest.mark.parametrize("tree", ["command"], indirect=True)
def test_the_added_command_is_one_like_the_others(tree: Path) -> None:
    program = (sys.executable, "-m", "hybrid_train")
    assert "rates" in run(tree, *program, "--help")
    assert "places" in run(tree, *program, "rates", "--help")
    refused = subprocess.run(
        [*program, "rates", "run_dir=nowhere", "places=-1"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "places = -1: must be at least 1" in refused.stderr
