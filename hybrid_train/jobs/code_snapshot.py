"""The code that runs: which commit it is, and a copy of it beside a run that was submitted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hybrid_train
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.schema.problems import UserError

PARTS = ("hybrid_train", "conf", "launch")  # of a checkout, which decide what a run does
SNAPSHOT = "VERSION"  # in a copy of the code beside a run: which code it is
_UNCHANGED = "nothing changed since"
_GIT_S = 60.0  # a repository on a slow disk must not keep a run from starting
_NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.pyc")


def code_of(root: Path) -> dict[str, Any]:
    """Return commit and state of a checkout, or of the copy of one; empty for an installed package.

    Args:
        root: the folder that the package is in.
    """
    if (root / ".git").exists():
        return checkout_state(root, "--", *PARTS)
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


def checkout_state(root: Path, *which: str) -> dict[str, Any]:
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


def launch_dir() -> Path:
    """Return launch/, which holds the batch scripts: beside the package, or where a wheel puts it.

    Raises:
        UserError: if it is in neither place.
    """
    source_tree = Path(hybrid_train.__file__).resolve().parents[1] / "launch"
    wheel = Path(sys.prefix) / "share" / "hybrid_train" / "launch"
    for place in (source_tree, wheel):
        if (place / "slurm" / "train.sbatch").is_file():
            return place
    raise UserError(
        f"no folder with the batch scripts (slurm/train.sbatch in it) at {source_tree}, {wheel}; "
        "install the package again"
    )


def write_snapshot(target: Path, launch: Path) -> None:
    """Copy package, conf/ and launch/ into a folder; what was there before is replaced as a whole.

    Of a git checkout those files are copied that git knows or would take, else all of them.

    Args:
        target: the folder.
        launch: the launch/ folder that submits.
    """
    fresh, old = target.with_name("code.new"), target.with_name("code.old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    package = Path(hybrid_train.__file__).parent
    root = package.parent
    listed = _listed(root)
    if listed is None:
        shutil.copytree(package, fresh / "hybrid_train", ignore=_NOT_SOURCE)
        shutil.copytree(conf_dir(), fresh / "conf", ignore=_NOT_SOURCE)
        shutil.copytree(launch, fresh / "launch", ignore=_NOT_SOURCE)
    else:
        for name in listed:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, fresh / name)
    said = version_text(root, is_checkout=listed is not None)
    (fresh / SNAPSHOT).write_text(said, encoding="utf-8")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _listed(root: Path) -> list[str] | None:
    """Return the files that git knows or would take; None where this is no checkout."""
    if not (root / ".git").exists():
        return None
    names = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS)
    if names is None:
        return None
    return [name for name in names.split("\0") if name and (root / name).is_file()]
