"""Which code runs: commit of a checkout, or of a copy beside a run, and whether files differ."""

import os
import subprocess
from pathlib import Path
from typing import Any

PARTS = ("hybrid_train", "conf", "launch")  # of a checkout, which decide what a run does
SNAPSHOT = "VERSION"  # in a copy of the code beside a run: which code it is
_UNCHANGED = "nothing changed since"
_GIT_S = 60.0  # a repository on a slow disk must not keep a run from starting


def code_of(root: Path) -> dict[str, Any]:
    """Return commit and state of a checkout, or of the copy of one; empty for an installed package.

    Args:
        root: the folder that the package is in.
    """
    if (root / ".git").exists():
        return state_of(root, "--", *PARTS)
    copied = root / SNAPSHOT
    lines = copied.read_text(encoding="utf-8").splitlines() if copied.is_file() else []
    commit = next((line.split()[1] for line in lines if line.startswith("commit ")), None)
    return {"commit": commit, "dirty": _UNCHANGED not in lines} if commit else {}


def version_text(root: Path, *, is_checkout: bool) -> str:
    """Return lines that say which code a copy of it is; `code_of` reads them."""
    if not is_checkout:
        return f"installed package, from {root}\n"
    commit = (git(root, "rev-parse", "HEAD") or "none").strip()
    changes = (git(root, "status", "--porcelain", "--", *PARTS) or "").rstrip()
    lines = [f"commit {commit}", "changed since" if changes else _UNCHANGED, changes]
    return "\n".join(filter(None, lines)) + "\n"


def git(root: Path, *words: str) -> str | None:
    """Return what git says; None where it is missing, refuses, or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True, text=True, check=False, timeout=_GIT_S,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # many runs may look at once
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def state_of(root: Path, *which: str) -> dict[str, Any]:
    """Return the commit of a checkout and whether files differ from it; null: git does not say."""
    commit, changes = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain", *which)
    return {
        "commit": commit.strip() if commit else None,
        "dirty": None if changes is None else bool(changes.strip()),
    }


def repository(folder: Path) -> Path | None:
    """Return the top of the repository that a folder is in; None if it is in none."""
    top = git(folder, "rev-parse", "--show-toplevel")
    return Path(top.rstrip("\n")).resolve() if top else None
