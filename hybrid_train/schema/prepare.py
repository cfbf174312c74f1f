"""The roots of the jobs that prepare data: from text to token files, and what is done with these.

Files and prefixes are named as on a command line: commas between them (and quotes around a name
that has one), * and ** as in a shell.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.limits import (
    FILE,
    FileName,
    Name,
    Range,
    Seconds,
    Seed,
    Share,
    TokenCount,
    Workers,
)
from hybrid_train.schema.names import listed, listed_paths
from hybrid_train.schema.problems import Problem

_SHARES_TOLERANCE = 1e-6
SMALLEST_VOCABULARY = 256  # every byte
Part = Annotated[float, Range(1e-9, 1)]


class Format(enum.Enum):
    """What input files hold; `auto` goes by names, then by content; other text is source code."""

    auto = "auto"
    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"  # one document a file
    lines = "lines"  # plain text, one document a line
    code = "code"  # folders: every text file below them is a document


@dataclass(kw_only=True)
class DataJob:
    """A job that reads files: input=FILES, repeated or with commas."""

    input: list[str] = MISSING  # files, globs, folders; input=a.jsonl,b/*.parquet,src,"one,name"

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if not listed_paths(self.input):
            yield Problem("input", "[]", "must name at least one file, glob or folder")
        for name in listed_paths(self.input):
            if bad := FILE.broken(name):
                yield Problem("input", name, bad[0])


@dataclass(kw_only=True)
class TextJob(DataJob):
    """A job that reads text."""

    format: Format = Format.auto
    text_key: Name = "text"  # of a JSON line or a Parquet column
    suffixes: list[str] = field(default_factory=list)  # [.py,.md]: of folders, these files only
    block_kb: Annotated[int, Range(1, 10**6)] = 1024  # text that a process takes at a time

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        for suffix in self.suffixes:
            if not suffix.startswith("."):
                yield Problem("suffixes", suffix, "must begin with a dot", f".{suffix}")


@dataclass(kw_only=True)
class TokenizeJob(TextJob):
    """Text becomes a pair of token files; the same command goes on after a kill."""

    output: FileName = MISSING  # prefix of the .bin and .idx
    tokenizer: FileName = MISSING  # Hugging Face folder, or SentencePiece model or its folder
    bos: bool = False  # begin each document with what the tokenizer puts before a text
    workers: Workers | None = None  # processes; None: one a core
    max_bad_share: Share = 0.01  # of the lines; beyond it the job stops
    overwrite: bool = False  # replace an output, or a partial one of another command
    word_cache: bool = True  # look up the words that were encoded before; the ids are the same
    save_interval_s: Seconds = 5.0  # between saves of the position

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        yield from _prefix(self.output)


@dataclass(kw_only=True)
class MergeJob(DataJob):
    """Token files of one tokenizer become one pair, in the order given."""

    output: FileName = MISSING  # prefix of the .bin and .idx
    overwrite: bool = False  # replace an output that is there

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        yield from _prefix(self.output)


@dataclass(kw_only=True)
class SplitJob(DataJob):
    """A pair of token files becomes several: by shares of the documents, or by tokens."""

    output: FileName = MISSING  # prefix of the parts: OUTPUT-00000 ..., or OUTPUT-NAME
    shares: list[Part] = field(default_factory=list)  # [0.99,0.01] of the documents, drawn
    names: list[Name] = field(default_factory=list)  # [train,validation]: one for each share
    tokens_per_shard: TokenCount | None = None  # "1B": documents in their order, none is cut
    seed: Seed = 1234  # of the draw
    overwrite: bool = False  # replace outputs that are there

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        yield from _prefix(self.output)
        if len(names := listed_paths(self.input)) > 1:
            yield Problem("input", ",".join(names), "takes one prefix; merge first")
        if bool(self.shares) == (self.tokens_per_shard is not None):
            given = "both" if self.shares else "neither"
            yield Problem("shares, tokens_per_shard", given, "one of them says how to split")
        if self.shares and not _are_shares(self.shares):
            yield Problem("shares", self.shares, "must be above 0 and add up to 1", "[0.99,0.01]")
        if self.names and len(self.names) != len(self.shares):
            yield Problem("names", self.names, f"must be {len(self.shares)}, one for each share")
        if len(set(self.names)) != len(self.names):
            yield Problem("names", self.names, "must differ from each other")


@dataclass(kw_only=True)
class InspectJob(DataJob):
    """What a pair of token files holds."""

    tokenizer: FileName | None = None  # to decode with; None: that of the manifest
    document: Annotated[int, Range(0, 10**12)] | None = None  # number of a document to print


@dataclass(kw_only=True)
class CountTokensJob(DataJob):
    """Documents and tokens of many token files."""


@dataclass(kw_only=True)
class VerifyTokensJob(DataJob):
    """Token files are read whole and compared with their index, manifest and vocabulary."""

    tokenizer: FileName | None = None  # for files without a manifest: ids must be in its vocabulary


@dataclass(kw_only=True)
class TrainTokenizerJob(TextJob):
    """A byte-level BPE tokenizer from text."""

    output: FileName = MISSING  # new folder, in the Hugging Face format
    vocab_size: Annotated[int, Range(SMALLEST_VOCABULARY + 1, 2**24)] = 32768
    special_tokens: list[str] = field(default_factory=lambda: ["<|endoftext|>"])  # first: the end
    sample_share: Part = 1.0  # of the blocks of text, drawn
    seed: Seed = 1234  # of the draw

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        yield from _prefix(self.output)
        special = listed(self.special_tokens)
        if self.vocab_size < SMALLEST_VOCABULARY + len(special):
            smallest = SMALLEST_VOCABULARY + len(special)
            rule = f"must be at least {smallest}: each byte, and the special tokens"
            yield Problem("vocab_size", self.vocab_size, rule, smallest)
        if not special or len(set(special)) != len(special):
            rule = "must be different names, the first of them that of the end of a document"
            yield Problem("special_tokens", ",".join(special), rule)


def _prefix(output: str) -> Iterator[Problem]:
    if output.endswith("/"):
        yield Problem("output", output, "must name a file, without .bin or .idx")
    elif output.endswith((".bin", ".idx")):
        yield Problem("output", output, "is written without .bin or .idx", output[:-4])


def _are_shares(shares: Sequence[float]) -> bool:
    return min(shares) > 0 and abs(sum(shares) - 1) < _SHARES_TOLERANCE
