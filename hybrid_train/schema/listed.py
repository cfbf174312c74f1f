"""Lists of names as a command line writes them: commas between them, quotes around one with commas.

Where a path is meant, one that exists as it is written wins over the split at its commas.
"""

import os
import re
import shlex
from collections.abc import Sequence

# A name in quotes up to a comma or the end; else all up to the next comma.
_NAME = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)')\s*(?:,|$)|([^,]*)(?:,|$)""")
_TOKEN_FILES = ("", ".idx", ".bin")  # a prefix exists if one of its files does


def listed(texts: Sequence[str]) -> list[str]:
    """Return what raw texts name: ["a,b", '[c,"d,e"]'] -> a, b, c and one name, d,e."""
    return [name for text in texts for name in _names(text)]


def listed_paths(texts: Sequence[str]) -> list[str]:
    """Return the files, globs, folders and prefixes that raw texts name."""
    return [
        path for text in texts for path in ([text] if _is_there(text) else _names(text.strip()))
    ]


def in_quotes(name: str) -> str:
    """Write a name with a comma so that a shell and a list take it as one name."""
    mark = "'" if '"' in name else '"'
    return shlex.quote(f"{mark}{name}{mark}")


def _names(text: str) -> list[str]:
    text = text.strip()
    inner = text[1:-1] if text[:1] + text[-1:] == "[]" else text
    found = [one or other or plain.strip() for one, other, plain in _NAME.findall(inner)]
    return [name for name in found if name]


def _is_there(text: str) -> bool:
    return any(text and os.path.lexists(text + suffix) for suffix in _TOKEN_FILES)
