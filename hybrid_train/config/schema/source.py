"""One source of a blend: token files, local or remote, or a synthetic stream."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.config.problems import Problem, at_least

_LARGEST_COUNT = 10**9  # documents of a stream: their lengths lie in memory, four bytes each


class Split(enum.Enum):
    """Which part of a source: what is learned, or what is held out."""

    train = "train"
    validation = "validation"


@dataclass(kw_only=True)
class Remote:
    """How files behind a URL are read: in blocks, which a local folder keeps.

    Shuffled documents touch blocks in no order. Let the folder hold all files of the run, or, where
    it cannot, take small blocks: a block that is used for one document is fetched for it alone.
    """

    cache: str | None = None  # folder; None: hybrid_train/remote in $XDG_CACHE_HOME or ~/.cache
    cache_bytes: int = 20 * 2**30  # the blocks least recently used go when there are more
    block_bytes: int = 4 * 2**20  # of one request
    read_ahead: int = 2  # blocks fetched ahead of a reader that goes through a file in order
    tries: int = 5  # of one request
    first_wait_s: float = 0.5  # before the second try; twice as long before each further one

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(4096, block_bytes=self.block_bytes)
        yield from at_least(0, read_ahead=self.read_ahead, first_wait_s=self.first_wait_s)
        yield from at_least(1, tries=self.tries)
        if self.block_bytes % 8:
            # A token of eight bytes must not lie across two blocks.
            nearest = self.block_bytes // 8 * 8
            yield Problem("block_bytes", self.block_bytes, "must be a multiple of 8", nearest)
        wanted = (self.read_ahead + 2) * self.block_bytes
        if self.cache_bytes < wanted:
            rule = "must hold the blocks in use: (read_ahead + 2) * block_bytes"
            yield Problem("cache_bytes", self.cache_bytes, rule, wanted)


@dataclass(kw_only=True)
class Synthetic:
    """A stream drawn from a grammar; hybrid_train/data/synthetic.py has the grammars.

    A document has between `min_items` and `max_items` items, each number equally likely. What an
    item is depends on the kind: a symbol to copy, a pair, a pair of brackets, a sum.
    """

    kind: str = MISSING
    documents: int = 1_000_000  # of the train split
    validation_documents: int = 1_000
    min_items: int = 4
    max_items: int = 32
    seed: int = 0

    def problems(self) -> Iterator[Problem]:
        """Check the limits that all streams share."""
        yield from at_least(1, documents=self.documents, min_items=self.min_items)
        yield from at_least(0, validation_documents=self.validation_documents, seed=self.seed)
        for name in ("documents", "validation_documents"):
            if getattr(self, name) > _LARGEST_COUNT:
                yield Problem(name, getattr(self, name), "must be at most 1e9", _LARGEST_COUNT)
        if self.seed >= 2**64:
            yield Problem("seed", self.seed, "must be below 2**64", self.seed % 2**64)
        if self.max_items < self.min_items:
            yield Problem("max_items", self.max_items, "must not be below min_items")


@dataclass(kw_only=True)
class CopyStream(Synthetic):
    """A word of random symbols, then the same word again."""

    kind: str = "copy"
    symbols: int = 32

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        yield from at_least(1, symbols=self.symbols)


@dataclass(kw_only=True)
class RecallStream(Synthetic):
    """Pairs of a key and a value, then each key again, in another order, with its value."""

    kind: str = "recall"
    keys: int = 64
    values: int = 64

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        yield from at_least(1, values=self.values)
        if self.keys < self.max_items:
            rule = "must be at least max_items: the keys of a document differ"
            yield Problem("keys", self.keys, rule, self.max_items)


@dataclass(kw_only=True)
class BracketStream(Synthetic):
    """Balanced brackets of several types."""

    kind: str = "brackets"
    types: int = 4

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        yield from at_least(1, types=self.types)


@dataclass(kw_only=True)
class SumStream(Synthetic):
    """Sums of random numbers modulo a number."""

    kind: str = "sums"
    modulus: int = 23
    terms: int = 2  # numbers that one sum adds

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        yield from at_least(2, modulus=self.modulus)
        yield from at_least(1, terms=self.terms)


STREAMS = ("copy", "recall", "brackets", "sums")


@dataclass(kw_only=True)
class Source:
    """Tokens under one name: those of files, or one of the synthetic streams."""

    train: list[str] = field(default_factory=list)  # prefixes, without .bin or .idx; or URLs
    validation: list[str] = field(default_factory=list)
    longest: int | None = None  # packed documents are cut into pieces of so many tokens
    copy: CopyStream | None = None
    recall: RecallStream | None = None
    brackets: BracketStream | None = None
    sums: SumStream | None = None

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(1, longest=self.longest)
        chosen = [name for name in STREAMS if getattr(self, name) is not None]
        if self.train or self.validation:
            chosen.append("files")
        for name in chosen[1:]:
            rule = f"cannot stand beside {chosen[0]}: a source is files or one stream"
            yield Problem("train" if name == "files" else name, "(set)", rule)

    @property
    def stream(self) -> Synthetic | None:
        """Return the synthetic stream, if it is one."""
        streams: list[Synthetic | None] = [getattr(self, name) for name in STREAMS]
        return next((stream for stream in streams if stream is not None), None)

    def has(self, split: Split) -> bool:
        """Tell whether there are tokens for a split."""
        if self.stream is not None:
            return split is Split.train or self.stream.validation_documents > 0
        return bool(self.prefixes(split))

    def prefixes(self, split: Split) -> list[str]:
        """Return the prefixes of the files of a split."""
        return self.train if split is Split.train else self.validation
