"""Limits of the sources are reported beside their fields."""

import pytest

from hybrid_train.config.problems import collect
from hybrid_train.config.schema.source import (
    BracketStream,
    CopyStream,
    Files,
    RecallStream,
    Remote,
    Source,
    SumStream,
    Synthetic,
)

EVERY = [Files, CopyStream, RecallStream, BracketStream, SumStream]


@pytest.mark.parametrize("kind", EVERY)
def test_defaults_are_without_problems_and_name_their_kind(kind: type[Source]) -> None:
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
        (Files(remote=Remote(tries=0)), "remote.tries"),
        (Files(remote=Remote(block_bytes=4100)), "remote.block_bytes"),
        (Files(remote=Remote(block_bytes=8)), "remote.block_bytes"),
        (Files(remote=Remote(read_ahead=-1)), "remote.read_ahead"),
        (Files(remote=Remote(cache_bytes=2**20)), "remote.cache_bytes"),
    ],
)
def test_a_value_out_of_range_is_named(config: Source, path: str) -> None:
    assert [problem.path for problem in collect(config)] == [path]


def test_as_many_keys_as_pairs_are_enough() -> None:
    stream: Synthetic = RecallStream(keys=32, max_items=32)
    assert list(collect(stream)) == []
