"""Which checkpoints go when a new one has come."""

import shutil
from pathlib import Path

from hybrid_train.checkpoint.layout import FOLDER, PARTIAL, complete


def keep_newest(run_dir: Path, count: int) -> None:
    """Delete all complete checkpoints but the newest `count`."""
    for old in complete(run_dir)[:-count]:
        # A deletion that is cut off must not leave a folder that looks whole.
        shutil.rmtree(old.path.rename(old.path.with_name(old.path.name + PARTIAL)))


def drop_partial(run_dir: Path) -> list[Path]:
    """Delete what interrupted saves and deletions left behind, and return it for the log."""
    leftovers = sorted((run_dir / FOLDER).glob(f"*{PARTIAL}"))
    for folder in leftovers:
        shutil.rmtree(folder)
    return leftovers
