"""Which token files are meant: prefixes, globs of them, folders."""

import glob
from collections.abc import Sequence
from pathlib import Path

from hybrid_train.config.names import nearest
from hybrid_train.config.problems import UserError


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Return the prefixes of all inputs: inputs as given, matches and files of a folder by name.

    Raises:
        UserError: if an input names nothing.
    """
    return [prefix for name in inputs for prefix in _of_input(name)]


def _of_input(name: str) -> list[str]:
    plain = name.removesuffix(".idx").removesuffix(".bin")
    if Path(f"{plain}.idx").is_file() or Path(f"{plain}.bin").is_file():
        return [plain]
    pattern = str(Path(glob.escape(name), "*.idx")) if Path(name).is_dir() else f"{plain}.idx"
    found = [match.removesuffix(".idx") for match in sorted(glob.glob(pattern, recursive=True))]
    if not found:
        near = nearest(plain, [str(one)[:-4] for one in Path(plain).parent.glob("*.idx")])
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"input={name}: there is no {plain}.idx{hint}")
    return found
