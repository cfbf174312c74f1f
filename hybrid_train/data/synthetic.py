"""Synthetic streams: documents drawn from grammars, their words, the lowest loss there can be.

A stream has any number of documents. Document k of a split is drawn from a generator of its own:
Philox with the key (seed; kind, split, k). So each can be made alone, in any order and in any
process. With n items, n drawn evenly from `min_items` to `max_items`, all documents of a grammar
below are equally likely:

    copy      w1 .. wn | w1 .. wn END           each w one of `symbols`
    recall    k1 v1 .. kn vn ? q1 a1 .. qn an END
                                                the k differ; the q are the k in another order;
                                                the a are their values
    brackets  D END                             D any balanced string of n pairs, each pair of one
                                                of `types`
    sums      P1 .. Pn END                      P = x1 .. xt = s, s = (x1 + .. + xt) mod `modulus`,
                                                t = `terms`

Recall is associative recall with as many queries as pairs (Arora et al., arXiv:2312.04927).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from math import comb, lgamma, log
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.any_tokenizer import settings_of
from hybrid_train.data.tokenizers import END_OF_DOCUMENT
from hybrid_train.schema.data import (
    BracketStream,
    CopyStream,
    RecallStream,
    Split,
    SumStream,
    Synthetic,
)
from hybrid_train.schema.problems import UserError

type Symbols = NDArray[np.int64]


class SyntheticDocuments:
    """The documents of one split of a stream.

    Args:
        config: the stream; its `problems` are none.
        split: which documents.
        ids: token id of each symbol of `words_of(config)`, [symbols].
        end_of_document: id of the token that closes each document; not among `ids`.
    """

    def __init__(
        self, config: Synthetic, split: Split, ids: Sequence[int], end_of_document: int
    ) -> None:
        self.name = f"synthetic {config.kind} ({split.value}, seed {config.seed})"
        self._config = config
        self._grammar = _grammar(config)
        self._end = end_of_document
        self._ids = np.asarray(ids, dtype=np.int64)
        if len(self._ids) != len(self._grammar.words()) or end_of_document in self._ids:
            raise ValueError(f"{self.name}: one id for each symbol, none of them the end's")
        self._part = 2 * (split is Split.validation)
        is_train = split is Split.train
        count = config.documents if is_train else config.validation_documents
        # From one generator, since lengths are wanted of all documents at once; the first ones are
        # the same for every number of documents.
        self._items = self._generator(self._part + 1, 0).integers(
            config.min_items, config.max_items, size=count, dtype=np.int32, endpoint=True
        )
        self._latest: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, [D]."""
        return (self._grammar.length(self._items.astype(np.int64)) + 1).astype(np.int32)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of a document.

        Raises:
            IndexError: if there are no such tokens.
        """
        number, tokens = self._latest  # a document is often read in parts
        if number != document:
            tokens = self._draw(document)
            self._latest = (document, tokens)
        if not 0 <= start <= stop <= len(tokens):
            raise IndexError(f"tokens {start} to {stop} of a document of {len(tokens)}")
        return tokens[start:stop].copy()

    def fingerprint(self) -> str:
        """Name the parameters, the ids and some documents, so that another generator is noticed."""
        digest = hashlib.sha256(f"{self.name} {self._config} {self._end}".encode())
        digest.update(self._ids.tobytes())
        for document in range(min(4, len(self._items))):
            digest.update(self._draw(document).tobytes())
        return digest.hexdigest()[:32]

    def best_loss(self) -> float:
        """Entropy of the stream in nats per token: no model reaches less, on average.

            (log M + mean_n log(documents with n items)) / mean_n(tokens with n items)

        M is the number of lengths; both means are over them. It counts every token of a document,
        the first and END among them, each predicted from all those before it.
        """
        return best_loss(self._config)

    def _draw(self, document: int) -> NDArray[np.int64]:
        if not 0 <= document < len(self._items):
            raise IndexError(f"document {document} of {len(self._items)}, {self.name}")
        items = int(self._items[document])
        symbols = self._grammar.draw(items, self._generator(self._part, document))
        return np.append(self._ids[symbols], self._end)

    def _generator(self, part: int, document: int) -> np.random.Generator:
        place = (self._grammar.number << 8 | part) << 48 | document
        key = np.array([self._config.seed, place], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


def best_loss(config: Synthetic) -> float:
    """As `SyntheticDocuments.best_loss`, from the parameters alone."""
    grammar = _grammar(config)
    items = range(config.min_items, config.max_items + 1)
    entropy = log(len(items)) + fmean(grammar.log_count(n) for n in items)
    return entropy / float(np.mean(grammar.length(np.array(items)) + 1))


def words_of(config: Synthetic) -> list[str]:
    """A word for each symbol of a stream, in their order."""
    return _grammar(config).words()


class WordTokenizer:
    """Words with a space between them, as token ids; id 0 closes a document.

    It has the interface of `hybrid_train.data.tokenizers.Tokenizer`, which reads what is saved
    here. Where a text is written by hand, the end-of-document token is no word of it.

    Args:
        words: different ones, none with a space in it.
    """

    end_of_document = 0

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [END_OF_DOCUMENT, *words]
        self._ids = {word: number for number, word in enumerate(self._words)}
        if len(self._ids) < len(self._words) or any(len(word.split()) != 1 for word in words):
            raise ValueError("the words of a tokenizer differ and have no spaces")

    @property
    def vocab_size(self) -> int:
        """Number of words, and one for the end of a document."""
        return len(self._words)

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids.

        Raises:
            UserError: if it has a word that the vocabulary has not.
        """
        found = [self._ids.get(word, 0) for word in text.split()]
        if 0 in found:
            word = text.split()[found.index(0)]
            some = ", ".join(self._words[1:9])
            raise UserError(
                f"{word!r} is no word of this run's {self.vocab_size - 1}; its sources are "
                f"synthetic streams, which know words such as {some}"
            )
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn token ids into text; `skip_special` leaves out the end of a document.

        Ids beyond the vocabulary, which a padded model may give, are left out as by `Tokenizer`.
        """
        kept = (n for n in ids if (n or not skip_special) and n < len(self._words))
        return " ".join(self._words[number] for number in kept)

    @property
    def fingerprint(self) -> str:
        """Changes when a word or its id does."""
        return hashlib.sha256(json.dumps(self._words).encode()).hexdigest()[:32]

    def save(self, folder: str | Path) -> None:
        """Write the folder in the Hugging Face format."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": END_OF_DOCUMENT, "eos_token": END_OF_DOCUMENT}
        config = {
            **settings_of(special),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        files = {
            "tokenizer.json": self._as_json(),
            "tokenizer_config.json": config,
            "special_tokens_map.json": special,
        }
        for name, content in files.items():
            (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _as_json(self) -> dict[str, object]:
        """The format of the `tokenizers` library (0.23): words, split at white space."""
        end = {
            "id": 0, "content": END_OF_DOCUMENT, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }  # fmt: skip
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": END_OF_DOCUMENT},
        }


class Grammar(ABC):
    """How documents of n items look: their symbols are numbered from 0, END is not among them."""

    number: int  # of the kind, in the key of the generator: never changes

    @abstractmethod
    def words(self) -> list[str]:
        """A word for each symbol, for the eye."""

    @abstractmethod
    def length(self, items: Symbols) -> Symbols:
        """Symbols of documents with so many items, END not counted."""

    @abstractmethod
    def draw(self, items: int, random: np.random.Generator) -> Symbols:
        """Draw one of the documents with so many items, all equally likely."""

    @abstractmethod
    def log_count(self, items: int) -> float:
        """Natural logarithm of the number of documents with so many items."""


class _Copy(Grammar):
    number = 1

    def __init__(self, config: CopyStream) -> None:
        self._symbols = config.symbols

    def words(self) -> list[str]:
        return [*_numbered("c", self._symbols), "|"]

    def length(self, items: Symbols) -> Symbols:
        return 2 * items + 1

    def draw(self, items: int, random: np.random.Generator) -> Symbols:
        word = random.integers(self._symbols, size=items)
        return np.concatenate([word, [self._symbols], word])

    def log_count(self, items: int) -> float:
        return items * log(self._symbols)


class _Recall(Grammar):
    number = 2

    def __init__(self, config: RecallStream) -> None:
        self._keys, self._values = config.keys, config.values

    def words(self) -> list[str]:
        return [*_numbered("k", self._keys), *_numbered("v", self._values), "?"]

    def length(self, items: Symbols) -> Symbols:
        return 4 * items + 1

    def draw(self, items: int, random: np.random.Generator) -> Symbols:
        keys = random.permutation(self._keys)[:items]
        pairs = np.stack([keys, self._keys + random.integers(self._values, size=items)], axis=1)
        asked = random.permutation(pairs)
        return np.concatenate([pairs.ravel(), [self._keys + self._values], asked.ravel()])

    def log_count(self, items: int) -> float:
        keys_in_order = lgamma(self._keys + 1) - lgamma(self._keys - items + 1)
        return keys_in_order + items * log(self._values) + lgamma(items + 1)


class _Brackets(Grammar):
    number = 3

    def __init__(self, config: BracketStream) -> None:
        self._types = config.types

    def words(self) -> list[str]:
        return _numbered("(", self._types) + _numbered(")", self._types)

    def length(self, items: Symbols) -> Symbols:
        return 2 * items

    def draw(self, items: int, random: np.random.Generator) -> Symbols:
        # Cycle lemma (Dvoretzky and Motzkin, 1947): of the rotations of n steps up and n + 1 down,
        # exactly one stays at 0 or above until its last step; without that step it is balanced.
        up = random.permutation(2 * items + 1) < items
        lowest = int(np.argmin(np.cumsum(2 * up - 1)))
        balanced = [*up[lowest + 1 :].tolist(), *up[:lowest].tolist()]
        types = iter(random.integers(self._types, size=items).tolist())
        symbols, unclosed = [], []
        for is_up in balanced:
            if is_up:
                unclosed.append(next(types))
                symbols.append(unclosed[-1])
            else:
                symbols.append(self._types + unclosed.pop())
        return np.array(symbols)

    def log_count(self, items: int) -> float:
        return log(comb(2 * items, items) // (items + 1)) + items * log(self._types)


class _Sums(Grammar):
    number = 4

    def __init__(self, config: SumStream) -> None:
        self._modulus, self._terms = config.modulus, config.terms

    def words(self) -> list[str]:
        return [*_numbered("", self._modulus), "="]

    def length(self, items: Symbols) -> Symbols:
        return items * (self._terms + 2)

    def draw(self, items: int, random: np.random.Generator) -> Symbols:
        terms = random.integers(self._modulus, size=(items, self._terms))
        sums = terms.sum(axis=1, keepdims=True) % self._modulus
        return np.concatenate([terms, np.full_like(sums, self._modulus), sums], axis=1).ravel()

    def log_count(self, items: int) -> float:
        return items * self._terms * log(self._modulus)


def _grammar(config: Synthetic) -> Grammar:
    match config:
        case CopyStream():
            return _Copy(config)
        case RecallStream():
            return _Recall(config)
        case BracketStream():
            return _Brackets(config)
        case SumStream():
            return _Sums(config)
    raise ValueError(f"no grammar for {type(config).__name__}")


def _numbered(letter: str, count: int) -> list[str]:
    return [f"{letter}{number}" for number in range(count)]
