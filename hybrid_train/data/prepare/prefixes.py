"""Which token files are meant: prefixes, globs of them, folders."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from hybrid_train.data.prepare.listing import matches, nothing_named, once
from hybrid_train.schema.problems import UserError


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Return the prefixes of all inputs: inputs as given, matches and files of a folder by name.

    Of one input, files that links lead to as well count once.

    Raises:
        UserError: if an input names nothing, or what another one has named.
    """
    found: list[str] = []
    for name in inputs:
        of_input = _of_input(name)
        both = [Path(f"{prefix}.idx") for prefix in (*found, *of_input)]
        if len(once(both)) < len(both):
            raise UserError(f"input={name} names token files that are named before; once is enough")
        found += of_input
    return found


def _of_input(name: str) -> list[str]:
    plain = name.removesuffix(".idx").removesuffix(".bin")
    if os.path.isfile(f"{plain}.idx") or os.path.isfile(f"{plain}.bin"):
        return [plain]
    is_folder = os.path.isdir(name)
    pattern = str(Path(glob.escape(name), "*.idx")) if is_folder else f"{plain}.idx"
    found = once(list(map(Path, matches(pattern))))
    if not found:
        raise nothing_named(name, f"no {pattern if is_folder else plain + '.idx'}", ".idx")
    return [str(path).removesuffix(".idx") for path in found]
