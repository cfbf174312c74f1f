"""Some of the main layers in words: "first 2", "last 15%", "7", "3-9", "all"."""

import math
import re
from collections.abc import Iterable

RULE = 'must read "all", "first 2", "last 15%", "7" or "3-9"; layers count from 1'
# Nine digits are more layers than any model has; of hundreds Python makes infinity, or nothing.
_END = re.compile(r"(first|last)\s+(\d{1,9}(?:\.\d{1,9})?)\s*(%?)")
_RANGE = re.compile(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?")


def is_range(text: str) -> bool:
    """Tell whether `layers_of` can read the text."""
    words = text.strip()
    if words == "all":
        return True
    if match := _END.fullmatch(words):
        return match[3] == "%" or float(match[2]).is_integer()
    spans = _RANGE.fullmatch(words)
    return spans is not None and 0 < int(spans[1]) <= int(spans[2] or spans[1])


def layers_of(text: str, num_layers: int) -> range:
    """Return the layers, from 1, that a text names; a share of them is rounded up.

    Raises:
        ValueError: if the text is no such range.
    """
    if not is_range(text):
        raise ValueError(f"{text!r} {RULE}")
    words = text.strip()
    if words == "all":
        return range(1, num_layers + 1)
    if match := _END.fullmatch(words):
        share = float(match[2])
        count = math.ceil(share * num_layers / 100 - 1e-9) if match[3] else int(share)
        count = min(count, num_layers)
        first = 1 if match[1] == "first" else num_layers - count + 1
        return range(first, first + count)
    spans = _RANGE.fullmatch(words)
    assert spans is not None
    return range(int(spans[1]), min(int(spans[2] or spans[1]), num_layers) + 1)


def layers_of_groups(groups: Iterable[int], together: int) -> list[int]:
    """Return the layers of groups of so many neighbours; layers and groups count from 1."""
    return [(group - 1) * together + place for group in groups for place in range(1, together + 1)]
