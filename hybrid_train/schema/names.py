"""Names on a command line: what a misspelt one most likely means, and how a list of them is read.

A list is names between commas. Where it is of paths, one that exists as it is written is not split.
"""

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Sequence

_ALIKE = 0.6  # share of letters that two names have in common
_ALIKE_SECTION = 0.5  # of sections, where the last part is the same
_ALIKE_PART = 0.7  # of two parts of dotted names, which are short

# A name in quotes up to a comma or the end; else all up to the next comma.
_NAME = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)')\s*(?:,|$)|([^,]*)(?:,|$)""")
_TOKEN_FILES = ("", ".idx", ".bin")  # a prefix exists if one of its files does


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name`, or None if none is alike."""
    alike = difflib.get_close_matches(name, sorted(known), n=1, cutoff=_ALIKE)
    return alike[0] if alike else None


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """Return the dotted key that a misspelt one most likely means, or None.

    Section and last part are compared by themselves: most of `model.rope` and `model.moe` is the
    same, and yet they have nothing in common. `tokens` finds `train.tokens`.
    """
    section, _, name = key.rpartition(".")
    scores = {}
    for full in sorted(known):
        other_section, _, other = full.rpartition(".")
        parts = (_likeness(name, other), _likeness(section, other_section))
        is_same = parts[0] == 1 and (not section or parts[1] >= _ALIKE_SECTION)
        if is_same or min(parts) >= _ALIKE_PART:
            scores[full] = sum(parts)
    return max(scores, key=lambda full: scores[full]) if scores else None


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio() if one != other else 1.0


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
