"""Endlessly many documents drawn from grammars, with the lowest loss that a model can reach.

Document k of a split is drawn from a generator of its own: Philox with the key (seed; kind, split,
k). So each can be made alone, in any order and in any process. With n items, n drawn evenly from
`min_items` to `max_items`, all documents of a grammar below are equally likely:

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
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from math import comb, lgamma, log
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from hybrid_train.schema.source import (
    BracketStream,
    CopyStream,
    RecallStream,
    Split,
    SumStream,
    Synthetic,
)

type Symbols = NDArray[np.int64]


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
