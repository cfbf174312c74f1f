"""What a field may hold, beyond its type: the limits that annotations of the schemas name.

`heads: Size` says that the number of heads is an int, and within what. `problems.collect` compares
every value of a config with them, those in lists and dictionaries, too. Limits keep out what cannot
be meant: a larger value would hang, take all memory or overflow before it taught anybody anything.
"""

from dataclasses import dataclass
from typing import Annotated

from hybrid_train.schema.units import (
    POSITION_RULE,
    TOKENS_RULE,
    is_position,
    is_share,
    is_tokens,
    position,
    tokens,
)

_LONGEST_NAME = 200  # bytes; file systems take 255, and some names get an ending
_LONGEST_PATH = 3000  # bytes; Linux takes 4096, and there are files below a folder


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both ends included; NaN is in no range."""

    low: float
    high: float

    def broken(self, value: float) -> tuple[str, float | None] | None:
        """Return the rule that a value breaks and the nearest value that keeps it."""
        if self.low <= value <= self.high:
            return None
        if value < self.low:
            return f"must be at least {self.low}", self.low
        if value > self.high:
            return f"must be at most {self.high}", self.high
        return f"must be a number from {self.low} to {self.high}", self.low


@dataclass(frozen=True)
class Tokens:
    """Texts that say a number of tokens, or of something else: "2M"."""

    low: int
    what: str = "tokens"

    def broken(self, text: str) -> tuple[str, str | None] | None:
        """Return the rule that a text breaks and the nearest text that keeps it."""
        if not is_tokens(text):
            return TOKENS_RULE.replace("tokens", self.what), None
        bad = Range(self.low, MOST_TOKENS).broken(tokens(text))
        return bad and (bad[0], str(bad[1]))


@dataclass(frozen=True)
class TokensOrShare:
    """Texts that say a place in a run: "20T", or "80%"."""

    def broken(self, text: str) -> tuple[str, str | None] | None:
        """Return the rule that a text breaks and the nearest text that keeps it."""
        if not is_position(text):
            return POSITION_RULE, "50%"
        if not is_share(text):
            return Tokens(0).broken(text)
        return (
            None if position(text, MOST_TOKENS) <= MOST_TOKENS else ("must be at most 100%", "100%")
        )


@dataclass(frozen=True)
class Words:
    """Texts that name something: not empty, and as long as a system takes them."""

    what: str
    longest: int  # bytes of the whole

    def broken(self, text: str) -> tuple[str, str | None] | None:
        """Return the rule that a text breaks and the nearest text that keeps it."""
        if not text.strip() or "\0" in text:
            return f"must name {self.what}", text.replace("\0", "").strip() or None
        cut = "/".join(_cut(part, _LONGEST_NAME) for part in text.split("/"))
        if cut != text:
            return f"has a name of more than {_LONGEST_NAME} bytes", cut
        if len(text.encode()) > self.longest:
            return f"must have at most {self.longest} bytes", None
        return None


def _cut(name: str, most: int) -> str:
    """Return what fits of a name, in whole letters."""
    return name.encode("utf-8", "surrogateescape")[:most].decode("utf-8", "ignore")


COLDEST = 1e-4  # lowest temperature that divides logits; a much lower one is 0 in float32
MOST_TOKENS = 10**15  # a hundred times what any model has seen; exact as a float64

Size = Annotated[int, Range(1, 2**20)]  # widths and parts of a layer; the widest known have 2^17
Length = Annotated[int, Range(1, 2**30)]  # tokens of a sequence, or text
Vocabulary = Annotated[int, Range(1, 2**24)]  # sixteen times the largest known
Batch = Annotated[int, Range(1, 2**20)]  # sequences; the largest known have 2^14
Count = Annotated[int, Range(1, 10**9)]
CountOrNone = Annotated[int, Range(0, 10**9)]  # 0: none, or never
Processes = Annotated[int, Range(1, 10**6)]  # ten times the largest machine
Workers = Annotated[int, Range(1, 1024)]  # threads or processes of one machine
Seed = Annotated[int, Range(0, 2**64 - 1)]  # as torch and Philox take it; numpy has the low 32 bits
Share = Annotated[float, Range(0, 1)]
Factor = Annotated[float, Range(0, 1000)]  # of a term of the loss, or of a threshold
Seconds = Annotated[float, Range(0, 10**8)]  # three years; waits of the system end at 2^63 ns
SecondsOrMore = Annotated[float, Range(1, 10**8)]
Rate = Annotated[float, Range(0, 5)]  # of learning; AdamW moves a weight by about so much a step
Weight = Annotated[float, Range(0, MOST_TOKENS)]  # of a source, which may be its tokens

FILE = Words("a file or folder", _LONGEST_PATH)
FileName = Annotated[str, FILE]
Name = Annotated[str, Words("something", _LONGEST_NAME)]
TokenCount = Annotated[str, Tokens(1)]
TokenCountOrNone = Annotated[str, Tokens(0)]  # 0: none
Parameters = Annotated[str, Tokens(1, "parameters")]  # 4.5B
Place = Annotated[str, TokensOrShare()]
