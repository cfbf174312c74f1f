"""From the configuration of a source to its documents, and to a vocabulary where it has its own."""

from collections.abc import Iterable
from typing import Protocol

from hybrid_train.data.any_tokenizer import AnyTokenizer, open_tokenizer
from hybrid_train.data.documents import Documents, FileDocuments
from hybrid_train.data.synthetic import SyntheticDocuments, WordTokenizer, words_of
from hybrid_train.schema.data import Data, Remote, Source, Split, Synthetic, named_sources
from hybrid_train.schema.problems import UserError


class Vocabulary(Protocol):
    """What a source must know of the tokenizer of a run."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def end_of_document(self) -> int:
        """Id of the token that closes each document."""


def open_source(
    config: Source, split: Split, tokenizer: Vocabulary, remote: Remote | None = None
) -> list[Documents]:
    """Open one split of a source: documents of each prefix, or those of the stream.

    Symbols of a stream are the words of a `WordTokenizer`. With a tokenizer of text they take its
    ids from 0 on, without that of the end of a document: its texts then mean nothing.

    Args:
        config: the source; its `problems` are none.
        split: which part; the list is empty if the source has none of it.
        tokenizer: of the run; its ids are those of the documents.
        remote: how prefixes are read that are URLs.

    Raises:
        UserError: as `FileDocuments`, or if a stream has more symbols than the tokenizer has ids.
    """
    if not config.has(split):
        return []
    if config.stream is not None:
        ids = _symbol_ids(config.stream, tokenizer)
        return [SyntheticDocuments(config.stream, split, ids, tokenizer.end_of_document)]
    prefixes, size = config.prefixes(split), tokenizer.vocab_size
    return [FileDocuments(prefix, size, remote=remote) for prefix in prefixes]


def tokenizer_of(data: Data) -> AnyTokenizer:
    """Open the tokenizer of a run: its own words if all its sources are streams.

    Raises:
        UserError: if the folder that is named holds none.
    """
    words = own_vocabulary(named_sources(data).values())
    return words or open_tokenizer(data.tokenizer or "")


def own_vocabulary(sources: Iterable[Source]) -> WordTokenizer | None:
    """The words of all sources if all of them are streams; None if one needs a real tokenizer."""
    words: dict[str, None] = {}  # in order, each once: streams of a kind share theirs
    for source in sources:
        if source.stream is None:
            return None
        words |= dict.fromkeys(words_of(source.stream))
    return WordTokenizer(list(words)) if words else None


def _symbol_ids(config: Synthetic, tokenizer: Vocabulary) -> list[int]:
    words = words_of(config)
    if isinstance(tokenizer, WordTokenizer):
        return [tokenizer.encode(word)[0] for word in words]
    if len(words) >= tokenizer.vocab_size:
        raise UserError(
            f"the synthetic stream {config.kind} has {len(words)} symbols, the tokenizer only "
            f"{tokenizer.vocab_size} tokens with the end of a document; give the stream fewer"
        )
    return [number + (number >= tokenizer.end_of_document) for number in range(len(words))]
