"""The first line of a command that takes seconds to start: what starts, with what, and where."""

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
    run_dir = getattr(config, "run_dir", None)
    if not run_dir:
        return f"Starting: {shown}"
    goes_on = (Path(run_dir) / FROZEN_NAME).is_file()
    folder = f"Its run folder is {run_dir}, " + ("which has a run." if goes_on else "a new one.")
    return f"Starting: {shown}\n{folder}"
