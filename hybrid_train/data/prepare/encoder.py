"""Documents to token ids in the bytes of a token file; most words are looked up, not encoded.

The same words come again and again, and the tokenizers library computes each anew beyond its first
10,000. Where the cuts between words are known for sure, each word is encoded once and its ids are
kept, which gives the same ids at 1.98 times the library's speed (2026-11-28,
`tests/benchmarks/tokenize_text.py`). Every block has one document that is also encoded by the
library alone, and the two are compared.

A tokenizer.json says how it cuts text into words by a pattern for another regex engine, with
Unicode properties. The constructs that the published patterns use (GPT-2, cl100k, o200k and their
kin) mean the same in Python's `re` once the classes are spelt out; a pattern with anything else is
refused, and so is any other kind of tokenizer.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from hybrid_train.data.any_tokenizer import AnyTokenizer, FolderTokenizer

# ByteLevel with use_regex (tokenizers 0.23, pre_tokenizers/byte_level.rs), the pattern of GPT-2.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# White_Space of Unicode; Python's own \s holds four control characters more.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CONSTRUCT = re.compile(
    r"""\\p\{(?P<property>L|N|P|S|M|Lu|Ll|Lt|Lm|Lo)\}
      | \\(?P<space>[sS])
      | (?P<same>\\[rnt./|()\[\]{}?*+^$-]        # escapes of one character
             | \(\?: | \(\?i: | \(\?! | \((?!\?) | [)|^]
             | [?*+][+]? | \{\d+(?:,\d*)?\}[+]?   # quantifiers, greedy or possessive
             | [\w\ '/!,;:<>=_-])
      | (?P<open>\[\^?) | (?P<close>\])""",
    re.VERBOSE | re.ASCII,
)
_LAST_OF_PLANE = 0xFFFF
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_KEPT_WORDS = 1_000_000  # some 200 MB a process; then all are forgotten
_LONG_WORD = 64  # characters; longer ones seldom come again
_CHUNK = 2**20  # characters of a long text that are cut into words at once
_COMPARED = 2**16  # characters; a longer text would cost too much to encode twice
# Between a letter and a space before a letter every known pattern cuts, whatever stands around.
_SURE_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")


@dataclass(frozen=True)
class WordPattern:
    """Cuts text into words.

    Attributes:
        words: matches one word after the other and leaves nothing out.
        added: tokens that are taken out of a text before it is cut; None if there are none.
        nfc: whether the tokenizer composes accents first.
    """

    words: re.Pattern[str]
    added: re.Pattern[str] | None
    nfc: bool

    def fits(self, text: str) -> bool:
        """Tell whether the words of this text are those of the tokenizer."""
        if text.isascii():
            return self.added is None or not self.added.search(text)
        if any(map(_is_unsure, set("".join(_NOT_ASCII.findall(text))))):
            return False
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            return False
        return self.added is None or not self.added.search(text)


@dataclass(frozen=True)
class Encoded:
    """Documents of a block, one behind the other.

    Attributes:
        ids: little-endian ids, each document closed by its end-of-document token.
        lengths: int32, tokens in each document, that token included.
    """

    ids: bytes
    lengths: bytes


class Encoder:
    """Encodes documents with one tokenizer, in one process.

    Args:
        tokenizer: does it.
        dtype: of the ids.
        begin: ids that each document begins with.
        word_cache: whether words that come again are looked up.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        dtype: np.dtype[np.generic],
        begin: Sequence[int] = (),
        *,
        word_cache: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self.dtype = dtype
        self._begin = np.array(begin, dtype).tobytes()
        self._end = np.array([tokenizer.end_of_document], dtype).tobytes()
        description = getattr(tokenizer, "description", None)  # SentencePiece has none
        self._pattern = word_pattern(description) if description and word_cache else None
        self._words = _Words(tokenizer, dtype)

    @property
    def looks_up_words(self) -> bool:
        """Whether the words of this tokenizer are known for sure."""
        return self._pattern is not None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode each text and close it.

        Raises:
            RuntimeError: if looking up words gives other ids than the tokenizer; a fault of ours.
        """
        pattern = self._pattern
        parts: list[bytes] = []
        if pattern is None:
            for ids in self._tokenizer.encode_batch(texts):
                parts.append(np.array(ids, self.dtype).tobytes())
        else:
            parts = [self._looked_up(text, pattern) for text in texts]
            self._compare(texts, parts)
        if self._begin:
            parts = [self._begin + part for part in parts]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts)) // self.dtype.itemsize + 1
        ids_of_all = self._end.join([*parts, b""]) if parts else b""
        return Encoded(ids_of_all, lengths.astype("<i4").tobytes())

    def _looked_up(self, text: str, pattern: WordPattern) -> bytes:
        if not pattern.fits(text):
            return np.array(self._tokenizer.encode(text), self.dtype).tobytes()
        find, look_up = pattern.words.findall, self._words.__getitem__
        if len(text) <= _CHUNK:
            return b"".join(map(look_up, find(text)))
        return b"".join(b"".join(map(look_up, find(part))) for part in chunks(text))

    def _compare(self, texts: Sequence[str], parts: Sequence[bytes]) -> None:
        for text, part in zip(texts, parts, strict=True):
            if len(text) <= _COMPARED:
                if np.array(self._tokenizer.encode(text), self.dtype).tobytes() != part:
                    raise RuntimeError(
                        "looking up words gave other ids than the tokenizer, which must not be; "
                        f"word_cache=false does without. The text begins with {text[:200]!r}"
                    )
                return


def chunks(text: str) -> Iterator[str]:
    """Cut a long text where words are sure to end, so that few words exist at a time."""
    start = 0
    while len(text) - start > _CHUNK:
        cut = _SURE_CUT.search(text, start + _CHUNK)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


class _Words(dict[str, bytes]):
    """Ids of the words seen so far."""

    def __init__(self, tokenizer: AnyTokenizer, dtype: np.dtype[np.generic]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._dtype = dtype

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._tokenizer.encode(word), self._dtype).tobytes()
        if len(word) <= _LONG_WORD:
            if len(self) >= _KEPT_WORDS:
                self.clear()
            self[word] = ids
        return ids


def beginning_of_text(tokenizer: FolderTokenizer) -> list[int]:
    """Return the ids that a tokenizer puts before a text by its own settings, such as a BOS."""
    plain = tokenizer.encode("a")
    whole = tokenizer.encode_prompt("a", begin=True, special=False)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def word_pattern(description: str) -> WordPattern | None:
    """Read the pattern of a tokenizer.json; None if words cannot be told apart for sure."""
    said: dict[str, Any] = json.loads(description)
    model, normalizer = said["model"], said.get("normalizer")
    if model.get("type") != "BPE" or model.get("dropout"):
        return None
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None
    source = _byte_level_pattern(said.get("pre_tokenizer") or {})
    translated = translated_pattern(source) if source else None
    if translated is None:
        return None
    # Special tokens are none in a text (see data/tokenizers.py); the others are taken out of it.
    added = [
        re.escape(one["content"]) for one in said.get("added_tokens", ()) if not one["special"]
    ]
    return WordPattern(
        words=translated,
        added=re.compile("|".join(added)) if added else None,
        nfc=normalizer is not None,
    )


def _byte_level_pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """Return the one pattern by which a pre-tokenizer cuts; None if it does anything more."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    if len(before) > 1 or last.get("use_regex", True):
        return None
    (split,) = before
    is_plain = split.get("type") == "Split" and split.get("behavior") == "Isolated"
    if not is_plain or split.get("invert"):
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return pattern


def translated_pattern(source: str) -> re.Pattern[str] | None:
    """Write a pattern of the tokenizers library for `re`; None if a part of it is not known."""
    parts: list[str] = []
    position, inside = 0, False
    while position < len(source):
        match = _CONSTRUCT.match(source, position)
        if match is None:
            return None
        position = match.end()
        kind = match.lastgroup
        if kind == "open":
            if inside:
                return None  # a class within a class: an intersection or a union
            inside = True
            parts.append(match[0])
        elif kind == "close":
            inside = False
            parts.append("]")
        elif kind == "same":
            if match[0] == "^" and not inside:
                return None  # an anchor
            parts.append(match[0])
        else:
            written = _class_of(match, inside)
            if written is None:
                return None
            parts.append(written)
    try:
        return re.compile("".join(parts))
    except re.error:
        return None


def _class_of(match: re.Match[str], inside: bool) -> str | None:
    """Spell out a property or a kind of space."""
    if match["property"]:
        ranges = property_ranges(match["property"])
        return ranges if inside else f"[{ranges}]"
    if match["space"] == "s":
        return _SPACE if inside else f"[{_SPACE}]"
    return None if inside else f"[^{_SPACE}]"


@cache
def property_ranges(name: str) -> str:
    """Return the characters of a Unicode category in the basic plane, as ranges of a class."""
    return _ranges(lambda char: unicodedata.category(char).startswith(name), _LAST_OF_PLANE)


def _ranges(belongs: Callable[[str], bool], last: int) -> str:
    def spans() -> Iterator[tuple[int, int]]:
        start = None
        for code in range(last + 2):
            inside = code <= last and belongs(chr(code))
            if inside and start is None:
                start = code
            elif not inside and start is not None:
                yield start, code - 1
                start = None

    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in spans())


@cache
def _is_unsure(char: str) -> bool:
    """Tell whether `property_ranges` may class a character otherwise than the tokenizer does.

    What is not assigned yet may be a letter in a newer version of Unicode, and beyond the basic
    plane only symbols, such as emoji, are known to be neither letters nor numbers.
    """
    category = unicodedata.category(char)
    return category == "Cn" or (ord(char) > _LAST_OF_PLANE and not category.startswith("S"))
