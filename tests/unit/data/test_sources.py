"""A source opens as documents whose ids are those of the run's tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hybrid_train.data.sources import open_source, own_vocabulary
from hybrid_train.schema.data import (
    BracketStream,
    CopyStream,
    RecallStream,
    Remote,
    Source,
    Split,
    SumStream,
    Synthetic,
)
from hybrid_train.schema.problems import UserError
from tests.unit.data.corpus import END, VOCAB, write_corpus
from tests.unit.data.http_folder import serve


def of(stream: Synthetic) -> Source:
    """A source of a stream."""
    return Source(**{stream.kind: stream})


STREAMS = [
    of(stream)
    for stream in (
        CopyStream(), RecallStream(), BracketStream(), SumStream(), CopyStream(symbols=40)
    )
]  # fmt: skip


@dataclass
class Ids:
    """All that a source asks of a tokenizer of text."""

    vocab_size: int = VOCAB
    end_of_document: int = END


def test_files_open_as_one_set_of_documents_for_each_prefix(tmp_path: Path) -> None:
    for name, lengths in [("a", [3, 5]), ("b", [7]), ("held_out", [9])]:
        write_corpus(tmp_path / name, lengths)
    prefixes = [str(tmp_path / name) for name in ("a", "b", "held_out")]
    config = Source(train=prefixes[:2], validation=prefixes[2:])
    train = open_source(config, Split.train, Ids())
    held_out = open_source(config, Split.validation, Ids())
    assert [documents.name for documents in [*train, *held_out]] == prefixes
    assert [documents.lengths.tolist() for documents in [*train, *held_out]] == [[3, 5], [7], [9]]
    with pytest.raises(UserError, match="vocabulary ends at 9"):
        open_source(config, Split.train, Ids(vocab_size=10))


def test_files_behind_a_url_are_kept_where_the_source_says(tmp_path: Path) -> None:
    write_corpus(tmp_path / "served" / "a", [3, 5])
    with serve(tmp_path / "served") as server:
        config, remote = Source(train=[f"{server.url}/a"]), Remote(cache=str(tmp_path / "here"))
        (documents,) = open_source(config, Split.train, Ids(), remote)
        assert documents.read(1, 4, 5).tolist() == [END]
    assert any((tmp_path / "here").iterdir())


def test_streams_need_no_tokenizer_and_their_texts_can_be_shown() -> None:
    vocabulary = own_vocabulary(STREAMS)
    assert vocabulary is not None
    for config in STREAMS:
        (documents,) = open_source(config, Split.train, vocabulary)
        tokens = documents.read(0, 0, int(documents.lengths[0]))
        assert tokens[-1] == vocabulary.end_of_document
        assert tokens.max() < vocabulary.vocab_size
        shown = vocabulary.decode(tokens.tolist(), skip_special=True)
        assert vocabulary.encode(shown) == tokens[:-1].tolist()
    (sums,) = open_source(of(SumStream()), Split.train, vocabulary)
    first, second, equals, total = vocabulary.decode(sums.read(0, 0, 4).tolist()).split()
    assert equals == "="
    assert (int(first) + int(second)) % 23 == int(total)


def test_streams_of_one_kind_share_their_words() -> None:
    # symbols and a sign each: 40 + 1, 64 + 64 + 1, 8, 23 + 1; the end of a document
    vocabulary = own_vocabulary(STREAMS)
    assert vocabulary is not None
    assert vocabulary.vocab_size == 41 + 129 + 8 + 24 + 1


@pytest.mark.parametrize("sources", [[], [Source()], [of(CopyStream()), Source()]])
def test_a_run_with_files_has_no_vocabulary_of_its_own(sources: list[Source]) -> None:
    assert own_vocabulary(sources) is None


@pytest.mark.parametrize("end", [0, 3, 9])
def test_a_stream_beside_text_takes_the_ids_that_are_not_the_end(end: int) -> None:
    config = of(CopyStream(symbols=8))
    (documents,) = open_source(config, Split.train, Ids(vocab_size=10, end_of_document=end))
    tokens = [documents.read(k, 0, int(n)) for k, n in enumerate(documents.lengths[:100].tolist())]
    assert all(part[-1] == end for part in tokens)
    symbols = np.unique(np.concatenate([part[:-1] for part in tokens]))
    assert symbols.tolist() == [i for i in range(10) if i != end]


def test_a_stream_with_too_many_symbols_for_the_tokenizer_is_named() -> None:
    with pytest.raises(UserError, match="copy has 33 symbols, the tokenizer only 33 tokens"):
        open_source(of(CopyStream(symbols=32)), Split.train, Ids(vocab_size=33))


@pytest.mark.parametrize("config", [*STREAMS, Source(train=["not read"])])
def test_a_source_without_validation_has_no_documents_of_it(config: Source) -> None:
    if config.stream is not None:
        config = of(type(config.stream)(validation_documents=0))
    assert open_source(config, Split.validation, Ids(vocab_size=1000)) == []
