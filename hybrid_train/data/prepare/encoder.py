"""Documents to token ids in the bytes of a token file; most words are looked up, not encoded.

The same words come again and again, and the tokenizers library computes each anew beyond its first
10,000. Where the cuts between words are known for sure (`word_pattern.py`), each word is encoded
once and its ids are kept, which is several times faster and gives the same ids. Every block has
one document that is also encoded by the library alone, and the two are compared.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hybrid_train.data.any_tokenizer import AnyTokenizer, FolderTokenizer
from hybrid_train.data.prepare.word_pattern import WordPattern, word_pattern

_KEPT_WORDS = 1_000_000  # some 200 MB a process; then all are forgotten
_LONG_WORD = 64  # characters; longer ones seldom come again
_STRETCH = 2**20  # characters of a long text that are cut into words at once
_COMPARED = 2**16  # characters; a longer text would cost too much to encode twice
# Between a letter and a space before a letter every known pattern cuts, whatever stands around.
_SURE_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")


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
        if len(text) <= _STRETCH:
            return b"".join(map(look_up, find(text)))
        return b"".join(b"".join(map(look_up, find(part))) for part in stretches(text))

    def _compare(self, texts: Sequence[str], parts: Sequence[bytes]) -> None:
        for text, part in zip(texts, parts, strict=True):
            if len(text) <= _COMPARED:
                if np.array(self._tokenizer.encode(text), self.dtype).tobytes() != part:
                    raise RuntimeError(
                        "looking up words gave other ids than the tokenizer, which must not be; "
                        f"word_cache=false does without. The text begins with {text[:200]!r}"
                    )
                return


def stretches(text: str) -> Iterator[str]:
    """Cut a long text where words are sure to end, so that few words exist at a time."""
    start = 0
    while len(text) - start > _STRETCH:
        cut = _SURE_CUT.search(text, start + _STRETCH)
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


def beginning(tokenizer: FolderTokenizer) -> list[int]:
    """Return the ids that a tokenizer puts before a text by its own settings, such as a BOS."""
    plain = tokenizer.encode("a")
    whole = tokenizer.encode_prompt("a", begin=True, special=False)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []
