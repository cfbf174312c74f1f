"""Streams have exactly the grammar and the entropy that they claim; each language is counted."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from hybrid_train.data.synthetic import SyntheticDocuments, best_loss, words_of
from hybrid_train.schema.data import (
    BracketStream,
    CopyStream,
    RecallStream,
    Split,
    SumStream,
    Synthetic,
)
from tests.sampled import sampled

SMALL: list[Synthetic] = [
    CopyStream(symbols=3, min_items=1, max_items=3),
    RecallStream(keys=3, values=2, min_items=1, max_items=2),
    BracketStream(types=2, min_items=1, max_items=3),
    SumStream(modulus=3, terms=2, min_items=1, max_items=2),
]
LARGE: list[Synthetic] = [
    CopyStream(symbols=50, min_items=10, max_items=200),
    RecallStream(keys=100, values=30, min_items=1, max_items=100),
    BracketStream(types=5, min_items=20, max_items=300),
    SumStream(modulus=97, terms=3, min_items=1, max_items=50),
]


def by_kind(config: Synthetic) -> str:
    return config.kind


def documents_of(config: Synthetic, split: Split = Split.train) -> SyntheticDocuments:
    return SyntheticDocuments(config, split, range(1, len(words_of(config)) + 1), 0)


def all_texts(config: Synthetic, count: int) -> list[tuple[str, ...]]:
    stream = documents_of(config)
    lengths = stream.lengths.tolist()
    words = ["END", *words_of(config)]  # END has id 0
    documents = (stream.read(k, 0, lengths[k]).tolist() for k in range(count))
    return [tuple(words[token] for token in tokens) for tokens in documents]


def copies(config: CopyStream, n: int) -> Iterator[tuple[str, ...]]:
    for word in itertools.product([f"c{i}" for i in range(config.symbols)], repeat=n):
        yield (*word, "|", *word, "END")


def recalls(config: RecallStream, n: int) -> Iterator[tuple[str, ...]]:
    for keys in itertools.permutations([f"k{i}" for i in range(config.keys)], n):
        for values in itertools.product([f"v{i}" for i in range(config.values)], repeat=n):
            for asked in itertools.permutations(zip(keys, values, strict=True)):
                pairs = itertools.chain.from_iterable(zip(keys, values, strict=True))
                yield (*pairs, "?", *itertools.chain.from_iterable(asked), "END")


def is_balanced(word: tuple[str, ...]) -> bool:
    open_types: list[str] = []
    for bracket in word:
        if bracket[0] == "(":
            open_types.append(bracket[1:])
        elif not open_types or open_types.pop() != bracket[1:]:
            return False
    return not open_types


def brackets(config: BracketStream, n: int) -> Iterator[tuple[str, ...]]:
    letters = [f"{side}{i}" for side in "()" for i in range(config.types)]
    for word in itertools.product(letters, repeat=2 * n):
        if is_balanced(word):
            yield (*word, "END")


def sums(config: SumStream, n: int) -> Iterator[tuple[str, ...]]:
    one = [
        (*map(str, terms), "=", str(sum(terms) % config.modulus))
        for terms in itertools.product(range(config.modulus), repeat=config.terms)
    ]
    for problems in itertools.product(one, repeat=n):
        yield (*itertools.chain.from_iterable(problems), "END")


LANGUAGES: dict[str, Callable[..., Iterator[tuple[str, ...]]]] = {
    "copy": copies,
    "recall": recalls,
    "brackets": brackets,
    "sums": sums,
}


def language(config: Synthetic) -> dict[tuple[str, ...], float]:
    """Every document of a stream and its probability, by listing them."""
    found = {}
    numbers = range(config.min_items, config.max_items + 1)
    for n in numbers:
        listed = list(LANGUAGES[config.kind](config, n))
        assert len(set(listed)) == len(listed)
        found |= dict.fromkeys(listed, 1 / len(numbers) / len(listed))
    return found


@pytest.mark.parametrize("config", SMALL, ids=by_kind)
def test_documents_are_those_of_the_grammar_each_as_often_as_it_should(config: Synthetic) -> None:
    draws, expected = 8_000, language(config)
    counts = Counter(all_texts(config, draws))
    assert counts.keys() <= expected.keys()
    # Pearson's statistic has the mean and half the variance of its degrees of freedom.
    freedom = len(expected) - 1
    statistic = sum((counts[d] - draws * p) ** 2 / (draws * p) for d, p in expected.items())
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("config", SMALL, ids=by_kind)
def test_best_loss_is_the_entropy_of_the_listed_language(config: Synthetic) -> None:
    listed = language(config)
    entropy = -sum(p * math.log(p) for p in listed.values())
    tokens = sum(p * len(document) for document, p in listed.items())
    assert best_loss(config) == pytest.approx(entropy / tokens, rel=1e-12)
    assert documents_of(config).best_loss() == best_loss(config)


@pytest.mark.parametrize("config", sampled(SMALL, SMALL[0]), ids=by_kind)
def test_a_predictor_that_knows_the_grammar_reaches_the_best_loss(config: Synthetic) -> None:
    weight: dict[tuple[str, ...], float] = defaultdict(float)  # of all documents with this start
    for document, p in language(config).items():
        for stop in range(len(document) + 1):
            weight[document[:stop]] += p
    drawn = all_texts(config, 5_000)
    losses = [
        -math.log(weight[document[: stop + 1]] / weight[document[:stop]])
        for document in drawn
        for stop in range(len(document))
    ]
    assert np.mean(losses) == pytest.approx(best_loss(config), rel=0.02)


def test_a_predictor_that_only_counts_learns_sums_from_documents() -> None:
    # Two terms, "=" and a sum: the four tokens before one say all there is to know, except where
    # in the document it is; that is worth log(M) nats a document, M the number of lengths.
    config = SumStream(modulus=5, terms=2, min_items=20, max_items=20)
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    losses = []
    for number, document in enumerate(all_texts(config, 3_000)):
        padded = ("END",) * 4 + document
        for place in range(4, len(padded)):
            seen = counts[padded[place - 4 : place]]
            if number >= 2_000:
                smoothed = (seen[padded[place]] + 0.01) / (seen.total() + 0.07)  # 7 words
                losses.append(-math.log(smoothed))
            seen[padded[place]] += 1
    # The end of a document costs it more than the grammar: it cannot count to twenty.
    unknown_end = (math.log(20) + 19 * math.log(20 / 19)) / len(document)
    assert np.mean(losses) == pytest.approx(best_loss(config) + unknown_end, rel=0.01)


@pytest.mark.parametrize("config", LARGE, ids=by_kind)
def test_long_documents_keep_to_the_grammar_and_to_their_lengths(config: Synthetic) -> None:
    seen = set()
    for *body, end in all_texts(config, 300):
        assert end == "END"
        assert "END" not in body
        match config:
            case CopyStream():
                items = len(body) // 2
                assert body == [*body[:items], "|", *body[:items]]
            case RecallStream():
                middle = body.index("?")
                items = middle // 2
                table = dict(zip(body[:middle:2], body[1:middle:2], strict=True))
                assert len(table) == items
                asked = dict(zip(body[middle + 1 :: 2], body[middle + 2 :: 2], strict=True))
                assert asked == table
            case BracketStream():
                items = len(body) // 2
                assert is_balanced(tuple(body))
            case SumStream():
                rows = np.array(body).reshape(-1, config.terms + 2)
                items = len(rows)
                terms = rows[:, : config.terms].astype(int).sum(axis=1)
                assert (rows[:, -1].astype(int) == terms % config.modulus).all()
        assert config.min_items <= items <= config.max_items
        seen.add(items)
    assert len(seen) > 0.6 * min(300, config.max_items - config.min_items + 1)


@pytest.mark.parametrize("config", LARGE, ids=by_kind)
def test_a_document_is_the_same_alone_and_in_any_order(config: Synthetic) -> None:
    whole = all_texts(config, 20)
    for k in reversed(range(20)):
        stream = documents_of(config)
        length = int(stream.lengths[k])
        parts = [stream.read(k, length // 3, length), stream.read(k, 0, length // 3)]
        words = ["END", *words_of(config)]
        found = tuple(words[token] for token in np.concatenate(parts[::-1]).tolist())
        assert found == whole[k]


@pytest.mark.parametrize("config", SMALL, ids=by_kind)
def test_more_documents_begin_with_the_same_ones(config: Synthetic) -> None:
    fewer = type(config)(**{**vars(config), "documents": 15})
    assert all_texts(fewer, 15) == all_texts(config, 15)
    assert len(documents_of(fewer).lengths) == 15


@pytest.mark.parametrize("config", LARGE, ids=by_kind)
def test_splits_and_seeds_have_documents_of_their_own(config: Synthetic) -> None:
    other = type(config)(**{**vars(config), "seed": config.seed + 1})
    streams = [documents_of(config), documents_of(config, Split.validation), documents_of(other)]
    assert len(streams[1].lengths) == config.validation_documents
    heads = [[tuple(s.read(k, 0, 2).tolist()) for k in range(200)] for s in streams]
    items = [s.lengths[:200].tolist() for s in streams]
    for first, second in itertools.combinations(range(3), 2):
        assert heads[first] != heads[second]
        assert items[first] != items[second]
    assert len({s.fingerprint() for s in streams}) == 3


def test_ids_are_those_that_were_given() -> None:
    config = SumStream(modulus=2, terms=1, min_items=1, max_items=1)
    tokens = SyntheticDocuments(config, Split.train, [70, 80, 90], 5).read(0, 0, 4)
    assert tokens.tolist() in ([70, 90, 70, 5], [80, 90, 80, 5])
    with pytest.raises(ValueError, match="one id for each symbol"):
        SyntheticDocuments(config, Split.train, [70, 80], 5)
    with pytest.raises(ValueError, match="none of them the end's"):
        SyntheticDocuments(config, Split.train, [70, 80, 5], 5)


def test_a_caller_may_write_into_what_it_has_read() -> None:
    stream = documents_of(SMALL[0])
    first = stream.read(0, 0, 3)
    before = first.tolist()
    first[:] = -1
    assert stream.read(0, 0, 3).tolist() == before


@pytest.mark.parametrize(("document", "start", "stop"), [(-1, 0, 1), (10**9, 0, 1), (0, 0, 99)])
def test_tokens_that_are_not_there_are_refused(document: int, start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        documents_of(SMALL[0]).read(document, start, stop)


def test_the_fingerprint_follows_parameters_and_ids() -> None:
    config = CopyStream(symbols=3)
    streams = [
        SyntheticDocuments(config, Split.train, [1, 2, 3, 4], 0),
        SyntheticDocuments(config, Split.train, [1, 2, 3, 5], 0),
        SyntheticDocuments(CopyStream(symbols=3, max_items=33), Split.train, [1, 2, 3, 4], 0),
        SyntheticDocuments(config, Split.train, [1, 2, 3, 4], 6),
    ]
    assert len({stream.fingerprint() for stream in streams}) == 4
    assert SyntheticDocuments(config, Split.train, [1, 2, 3, 4], 0).fingerprint() == (
        streams[0].fingerprint()
    )
