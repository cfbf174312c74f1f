"""Large numbers as people write them: "2M" tokens, "1.5T" tokens, "12.3 GB"."""

import math
import re

_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_PATTERN = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*([kMBT]?)")
_SHARE = re.compile(r"(\d+(?:\.\d*)?)\s*%")
TOKENS_RULE = "must be a number of tokens, such as 500000, 500k, 2M, 1.5B or 25T"
POSITION_RULE = "must be a number of tokens, such as 2M or 20T, or a share of the run, such as 80%"


def tokens(text: str) -> int:
    """Read a number of tokens: "2M" -> 2000000.

    Raises:
        ValueError: if the text is no number with an optional suffix k, M, B or T.
    """
    number = _number(text)
    if not math.isfinite(number):
        raise ValueError(f"{text!r} {TOKENS_RULE}")
    return round(number)


def is_tokens(text: str) -> bool:
    """Tell whether `tokens` can read the text."""
    return math.isfinite(_number(text))


def _number(text: str) -> float:
    """Return the number that a text says; NaN if none, infinity if too large for a float."""
    match = _PATTERN.fullmatch(text.strip())
    return math.nan if match is None else float(match[1]) * _FACTORS[match[2]]


def position(text: str, total: int) -> int:
    """Read a position in a run of `total` tokens: "20T", or a share, "80%".

    Raises:
        ValueError: if the text is neither.
    """
    if not is_share(text):
        return tokens(text)
    return round(float(text.strip().removesuffix("%")) * total / 100)


def is_position(text: str) -> bool:
    """Tell whether `position` can read the text."""
    return is_share(text) or is_tokens(text)


def is_share(text: str) -> bool:
    """Tell whether the text is a share of something, such as 80%."""
    match = _SHARE.fullmatch(text.strip())
    return match is not None and math.isfinite(float(match[1]))


def show_tokens(count: float) -> str:
    """Write a number of tokens the short way: 2000000 -> "2M", 1234567 -> "1.23M"."""
    for suffix in "TBMk":
        if count >= _FACTORS[suffix]:
            return f"{count / _FACTORS[suffix]:.3g}{suffix}"
    return f"{count:.1f}".removesuffix(".0")


_SIBILANT = re.compile(r".*(s|x|z|ch|sh)")
_ENDS_IN_Y = re.compile(r".*[^aeiou]y")


def counted(number: int, noun: str) -> str:
    """Write a number with what it counts: "1 step", "1,124 steps", "2 batches".

    Args:
        number: how many.
        noun: of one; what stands before it, as in "warning in all", belongs elsewhere.
    """
    if number == 1:
        return f"1 {noun}"
    if _ENDS_IN_Y.fullmatch(noun):
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}{'es' if _SIBILANT.fullmatch(noun) else 's'}"


def show_bytes(count: float) -> str:
    """Write a number of bytes the short way, in powers of ten: 2500000000 -> "2.5 GB"."""
    for prefix, factor in {"T": 10**12, "G": 10**9, "M": 10**6, "k": 10**3}.items():
        if count >= factor:
            return f"{count / factor:.3g} {prefix}B"
    return f"{count:g} B"
