"""What tests of several files share: a repository with a package in it."""

import subprocess
from pathlib import Path

import pytest

AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@b.example")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit and a package in it."""
    root = tmp_path / "tree"
    (root / "hybrid_train").mkdir(parents=True)
    (root / "hybrid_train" / "a.py").write_text("1\n")
    for words in (("init", "-q"), ("add", "."), (*AUTHOR, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", root, *words], check=True)
    return root
