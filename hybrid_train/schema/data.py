"""Where tokens come from: sources, the blend of them that a run reads, and how rows are made."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.limits import Factor, FileName, Length, Name, Range, Seed, Weight
from hybrid_train.schema.problems import Problem

Room = Annotated[int, Range(1, 2**60)]
Block = Annotated[int, Range(2**12, 2**30)]  # read into memory at once
Ahead = Annotated[int, Range(0, 1024)]
Tries = Annotated[int, Range(1, 20)]  # the waits between them double: a minute becomes a year
FirstWait = Annotated[float, Range(0, 60)]
Documents = Annotated[int, Range(1, 10**9)]  # their lengths lie in memory, four bytes each
DocumentsOrNone = Annotated[int, Range(0, 10**9)]
Items = Annotated[int, Range(1, 2**20)]  # each is at least a token, and its kind an id

STREAMS = ("copy", "recall", "brackets", "sums")  # fields of a source


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

    cache: FileName | None = None  # None: hybrid_train/remote in $XDG_CACHE_HOME or ~/.cache
    cache_bytes: Room = 20 * 2**30  # the blocks least recently used go when there are more
    block_bytes: Block = 4 * 2**20  # of one request
    read_ahead: Ahead = 2  # blocks fetched ahead of a reader that goes through a file in order
    tries: Tries = 5  # of one request
    first_wait_s: FirstWait = 0.5  # before the second try; twice as long before each further one

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
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
    documents: Documents = 1_000_000  # of the train split
    validation_documents: DocumentsOrNone = 1_000
    min_items: Items = 4
    max_items: Items = 32
    seed: Seed = 0

    def problems(self) -> Iterator[Problem]:
        """Check the limits that all streams share."""
        if self.max_items < self.min_items:
            yield Problem("max_items", self.max_items, "must not be below min_items")


@dataclass(kw_only=True)
class CopyStream(Synthetic):
    """A word of random symbols, then the same word again."""

    kind: str = "copy"
    symbols: Items = 32


@dataclass(kw_only=True)
class RecallStream(Synthetic):
    """Pairs of a key and a value, then each key again, in another order, with its value."""

    kind: str = "recall"
    keys: Items = 64
    values: Items = 64

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        if self.keys < self.max_items:
            rule = "must be at least max_items: the keys of a document differ"
            yield Problem("keys", self.keys, rule, self.max_items)


@dataclass(kw_only=True)
class BracketStream(Synthetic):
    """Balanced brackets of several types."""

    kind: str = "brackets"
    types: Items = 4


@dataclass(kw_only=True)
class SumStream(Synthetic):
    """Sums of random numbers modulo a number."""

    kind: str = "sums"
    modulus: Annotated[int, Range(2, 2**20)] = 23
    terms: Items = 2  # numbers that one sum adds


@dataclass(kw_only=True)
class Source:
    """Tokens under one name: those of files, or one of the synthetic streams."""

    train: list[FileName] = field(default_factory=list)  # prefixes, without .bin or .idx; or URLs
    validation: list[FileName] = field(default_factory=list)
    longest: Length | None = None  # packed documents are cut into spans of so many tokens
    copy: CopyStream | None = None
    recall: RecallStream | None = None
    brackets: BracketStream | None = None
    sums: SumStream | None = None

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
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


class Packing(enum.Enum):
    """How documents become rows of one length."""

    none = "none"  # one after the other; a row begins wherever the one before it ended
    best_fit = "best_fit"  # whole documents, none of which sees another


@dataclass(kw_only=True)
class Data:
    """Tokens from Megatron .bin/.idx files or synthetic streams, and the tokenizer of the files."""

    kind: str = "files"
    train: list[FileName] = field(default_factory=list)  # prefixes: all that one source needs
    validation: list[FileName] = field(default_factory=list)
    sources: dict[Name, Source] = field(default_factory=dict)  # by name, in place of the two above
    blend: dict[str, Weight] = field(default_factory=dict)  # weights; empty: by size
    validation_blend: dict[str, Weight] = field(default_factory=dict)  # the same for validation
    packing: Packing = Packing.none
    tokenizer: FileName | None = None  # folder of a Hugging Face or SentencePiece tokenizer
    cache: FileName | None = None  # folder of index caches; None: beside the files
    remote: Remote = field(default_factory=Remote)  # for the prefixes that are URLs
    warn_epochs: Factor = 4.0  # say so where a source is repeated more often
    accept_changes: bool = False  # go on although the data of the run has changed

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        for name in ("blend", "validation_blend"):
            yield from blend_problems(name, getattr(self, name))


@dataclass(kw_only=True)
class Quickstart(Data):
    """The source code of Python's own standard library; built on first use, nothing to download."""

    kind: str = "quickstart"
    folder: FileName = MISSING  # corpus, tokenizer and token files go here
    vocab_size: Annotated[int, Range(300, 2**24)] = 4096
    packages: list[Name] = field(default_factory=list)  # installed ones, whose source is added


def named_sources(data: Data) -> dict[str, Source]:
    """Return the sources by name; files without a source of their own make one called `data`."""
    return data.sources or {"data": Source(train=data.train, validation=data.validation)}


def has_sources(data: Data) -> bool:
    """Tell whether there are sources that a blend can name; the quickstart brings its one."""
    return bool(data.sources) and not isinstance(data, Quickstart)


def needs_tokenizer(data: Data) -> bool:
    """Tell whether any source is of text; streams alone bring a vocabulary of their own."""
    return any(source.stream is None for source in named_sources(data).values())


def blend_problems(path: str, blend: dict[str, float]) -> Iterator[Problem]:
    """Check that a blend takes something; an empty one is no choice at all."""
    if blend and all(weight == 0 for weight in blend.values()):
        yield Problem(path, "all zero", "needs a weight above 0")
