"""Where tokens come from."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.config.problems import Problem, at_least


@dataclass(kw_only=True)
class Data:
    """Tokens from Megatron .bin/.idx files, named by prefix, and the tokenizer that made them."""

    kind: str = "files"
    train: list[str] = field(default_factory=list)  # prefixes, without .bin or .idx
    validation: list[str] = field(default_factory=list)
    tokenizer: str | None = None  # Hugging Face tokenizer folder
    cache: str | None = None  # folder of index caches; None: beside the files


@dataclass(kw_only=True)
class Quickstart(Data):
    """The source code of Python's own standard library; built on first use, nothing to download."""

    kind: str = "quickstart"
    folder: str = MISSING  # corpus, tokenizer and token files go here
    vocab_size: int = 4096

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(300, vocab_size=self.vocab_size)
