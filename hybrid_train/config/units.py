"""Large numbers as people write them: "2M" tokens, "1.5T" tokens, "12.3 GB"."""

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
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} {TOKENS_RULE}")
    return round(float(match[1]) * _FACTORS[match[2]])


def is_tokens(text: str) -> bool:
    """Tell whether `tokens` can read the text."""
    return _PATTERN.fullmatch(text.strip()) is not None


def position(text: str, total: int) -> int:
    """Read a position in a run of `total` tokens: "20T", or a share, "80%".

    Raises:
        ValueError: if the text is neither.
    """
    match = _SHARE.fullmatch(text.strip())
    return tokens(text) if match is None else round(float(match[1]) * total / 100)


def is_position(text: str) -> bool:
    """Tell whether `position` can read the text."""
    return _SHARE.fullmatch(text.strip()) is not None or is_tokens(text)


def show_tokens(count: float) -> str:
    """Write a number of tokens the short way: 2000000 -> "2M", 1234567 -> "1.23M"."""
    for suffix in "TBMk":
        if count >= _FACTORS[suffix]:
            return f"{count / _FACTORS[suffix]:.3g}{suffix}"
    return f"{count:.1f}".removesuffix(".0")


def show_bytes(count: float) -> str:
    """Write a number of bytes the short way, in powers of ten: 2500000000 -> "2.5 GB"."""
    for prefix, factor in {"T": 10**12, "G": 10**9, "M": 10**6, "k": 10**3}.items():
        if count >= factor:
            return f"{count / factor:.3g} {prefix}B"
    return f"{count:g} B"
