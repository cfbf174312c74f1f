"""Limits of the sources are reported beside their fields."""

import pytest

from hybrid_train.schema.data import (
    BracketStream,
    CopyStream,
    RecallStream,
    Remote,
    Source,
    SumStream,
    Synthetic,
)
from hybrid_train.schema.problems import collect

EVERY = [CopyStream, RecallStream, BracketStream, SumStream]


@pytest.mark.parametrize("kind", EVERY)
def test_defaults_are_without_problems_and_name_their_kind(kind: type[Synthetic]) -> None:
    assert list(collect(kind())) == []
    assert len({k().kind for k in EVERY}) == len(EVERY)


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (CopyStream(documents=0), "documents"),
        (CopyStream(documents=10**9 + 1), "documents"),
        (CopyStream(validation_documents=-1), "validation_documents"),
        (CopyStream(min_items=0), "min_items"),
        (CopyStream(min_items=5, max_items=4), "max_items"),
        (CopyStream(seed=-1), "seed"),
        (CopyStream(seed=2**64), "seed"),
        (CopyStream(symbols=0), "symbols"),
        (RecallStream(keys=31), "keys"),
        (RecallStream(values=0), "values"),
        (BracketStream(types=0), "types"),
        (SumStream(modulus=1), "modulus"),
        (SumStream(terms=0), "terms"),
        (Remote(tries=0), "tries"),
        (Remote(block_bytes=4100), "block_bytes"),
        (Remote(block_bytes=8), "block_bytes"),
        (Remote(read_ahead=-1), "read_ahead"),
        (Remote(cache_bytes=2**20), "cache_bytes"),
    ],
)
def test_a_value_out_of_range_is_named(config: Synthetic | Remote, path: str) -> None:
    assert [problem.path for problem in collect(config)] == [path]


def test_a_source_is_either_files_or_one_stream() -> None:
    assert list(collect(Source(train=["a"]))) == list(collect(Source(sums=SumStream()))) == []
    both = Source(train=["a"], sums=SumStream(), copy=CopyStream(symbols=0))
    assert [problem.path for problem in collect(both)] == ["copy.symbols", "sums", "train"]


def test_as_many_keys_as_pairs_are_enough() -> None:
    stream: Synthetic = RecallStream(keys=32, max_items=32)
    assert list(collect(stream)) == []
