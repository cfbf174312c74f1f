"""A copy of the code beside a run, so that what was submitted is what runs, and runs again."""

import shutil
import sys
from pathlib import Path

import hybrid_train
from hybrid_train.config.compose import conf_dir
from hybrid_train.jobs.code_state import PARTS, SNAPSHOT, git, version_text
from hybrid_train.schema.problems import UserError

_NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.pyc")


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


def write(target: Path, launch: Path) -> None:
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
