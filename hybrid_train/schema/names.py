"""The known name that a misspelt one most likely means."""

import difflib
from collections.abc import Iterable

_ALIKE = 0.6  # share of letters that two names have in common
_ALIKE_SECTION = 0.5  # of sections, where the last part is the same
_ALIKE_PART = 0.7  # of two parts of dotted names, which are short


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
