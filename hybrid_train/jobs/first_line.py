"""The first line of a command that takes seconds to start: what starts, with what, and where."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_train.config.command_text import command
from hybrid_train.config.frozen import FROZEN_NAME

_LONGEST = 300  # characters of the command, which may have a whole text as a prompt


def first_line(name: str, words: Sequence[str], config: Any) -> str:
    """Return the line.

    Args:
        name: of the command.
        words: its overrides.
        config: what they were composed to.
    """
    typed = command(*name.split(), *words).replace("\n", " ")
    shown = typed if len(typed) <= _LONGEST else f"{typed[:_LONGEST]}..."
    said = _of_folder(Path(run_dir), name) if (run_dir := getattr(config, "run_dir", None)) else ""
    return f"Starting: {shown}{said}"


def _of_folder(run_dir: Path, name: str) -> str:
    """Say whether a run goes on or begins; if it does neither, the command itself will say it."""
    with contextlib.suppress(OSError):  # of a folder that nobody may read
        if (run_dir / FROZEN_NAME).is_file():
            return f"\nIts run folder is {run_dir}, which has a run."
        if name == "train" and (not run_dir.exists() or _is_empty(run_dir)):
            return f"\nIts run folder is {run_dir}, a new one."
    return ""


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
