"""Where tokens come from."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.limits import Factor, FileName, Name, Range, Weight
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.source import Remote, Source


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


@dataclass(kw_only=True)
class Quickstart(Data):
    """The source code of Python's own standard library; built on first use, nothing to download."""

    kind: str = "quickstart"
    folder: FileName = MISSING  # corpus, tokenizer and token files go here
    vocab_size: Annotated[int, Range(300, 2**24)] = 4096
    packages: list[Name] = field(default_factory=list)  # installed ones, whose source is added
