"""The known name that a misspelt one most likely means."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name`, or None if none is alike.

    For dotted names the last part counts too: `tokens` finds `train.tokens`.
    """
    names = sorted(known)
    alike = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if alike:
        return alike[0]
    leaf = name.rpartition(".")[2]
    same_leaf = [full for full in names if full.rpartition(".")[2] == leaf]
    if same_leaf:
        return max(same_leaf, key=lambda full: difflib.SequenceMatcher(None, name, full).ratio())
    alike = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return alike[0] if alike else None
