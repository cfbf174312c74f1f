"""Continuations of contexts that are read once, against the same texts in rows, each read whole."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hybrid_train.schema.problems import UserError
from tests.tiny import EVERY_KIND, MEGATRON_WARNINGS, VOCAB, alone, tiny_engine, tiny_job
from tests.unit.generation.conftest import let_every_layer_be_felt

pytestmark = MEGATRON_WARNINGS
ROUNDING = 2e-5  # nats: float32 sums of another order, through six layers
CONTEXTS = (40, 3, 700, 17, 40, 1)  # tokens; one is longer than a piece, one has nothing before it
CONTINUATIONS = ((4, 1, 9, 2), (3, 3), (2, 5, 1), (6,), (1, 1, 1, 1), (2, 2))


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    with alone() as groups:
        yield groups


@pytest.fixture(scope="module", params=[EVERY_KIND, "M*-M-", "M-", "*-"])
def engine(request: pytest.FixtureRequest, groups: Any) -> Any:
    """An engine whose weights are large enough that every layer is felt."""
    engine = tiny_engine(tiny_job(request.param), groups)
    let_every_layer_be_felt(engine.network.chunks[0])
    return engine


def some_texts() -> list[Any]:
    """Contexts with their continuations, in an order that mixes them, and equal texts twice."""
    from hybrid_train.generation.scoring import Text

    generator = torch.Generator().manual_seed(3)

    def some(length: int) -> list[int]:
        return torch.randint(VOCAB, (length,), generator=generator).tolist()

    texts = [
        Text([*context, *some(length)], len(context))
        for context, lengths in zip(map(some, CONTEXTS), CONTINUATIONS, strict=True)
        for length in lengths
    ]
    return [*texts[::2], Text(texts[0].tokens, texts[0].start), *texts[1::2], texts[3]]


def largest(found: list[Any], wanted: list[Any]) -> float:
    apart = [
        (one.log_probs - other.log_probs).abs() for one, other in zip(found, wanted, strict=True)
    ]
    return float(torch.cat(apart).max())


def each_alone(network: Any, texts: list[Any]) -> list[Any]:
    from hybrid_train.generation.scoring import score

    return [score(network, [text])[0] for text in texts]


@pytest.mark.parametrize("tokens", [64, 4096])
def test_continuations_have_the_scores_of_whole_texts(engine: Any, tokens: int) -> None:
    from hybrid_train.generation.scoring import Rows
    from hybrid_train.generation.shared_contexts import score_continuations

    texts = some_texts()
    found = score_continuations(engine.network, texts, rows=Rows(tokens=tokens))
    wanted = each_alone(engine.network, texts)
    assert [len(one.log_probs) for one in found] == [text.scored for text in texts]
    assert all(torch.equal(a.greedy, b.greedy) for a, b in zip(found, wanted, strict=True))
    print("largest difference, nats:", largest(found, wanted))
    assert largest(found, wanted) < ROUNDING
    assert engine.network.chunks[0].training


def test_what_contexts_begin_with_is_read_once(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions behind the same worked examples, with answers of one token."""
    from hybrid_train.generation.cached_model import CachedModel
    from hybrid_train.generation.scoring import Text
    from hybrid_train.generation.shared_contexts import score_continuations

    generator = torch.Generator().manual_seed(4)
    examples, *questions = (
        torch.randint(VOCAB, (length,), generator=generator).tolist() for length in (50, 39, 3, 20)
    )
    texts = [
        Text([*examples, *question, answer], 50 + len(question) - more)
        for question, more in zip(questions, (0, 2, 5), strict=True)
        for answer in (1, 7, 11, 12)  # the longest question alone would save more than the stem
    ]
    wanted = each_alone(engine.network, texts)
    seen = []
    read = CachedModel.read

    def counting(self: Any, rows: Any, tokens: Any, counts: Any) -> Any:
        seen.append(sum(counts))
        return read(self, rows, tokens, counts)

    monkeypatch.setattr(CachedModel, "read", counting)
    found = score_continuations(engine.network, texts)
    assert sum(seen) == 50 + 39 + 3 + 20
    assert largest(found, wanted) < ROUNDING
    assert all(torch.equal(a.greedy, b.greedy) for a, b in zip(found, wanted, strict=True))


def test_a_context_is_read_once_where_that_saves_tokens(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.generation.cached_model import CachedModel
    from hybrid_train.generation.shared_contexts import score_continuations

    seen = []
    read = CachedModel.read

    def counting(self: Any, rows: Any, tokens: Any, counts: Any) -> Any:
        seen.append(sum(counts))
        return read(self, rows, tokens, counts)

    monkeypatch.setattr(CachedModel, "read", counting)
    score_continuations(engine.network, some_texts())
    # Contexts of 40 and 700 tokens, their last one apart, and a window for each continuation: those
    # of one token have one window, so the second context of 40 is a row like any other.
    windows = [sum(CONTINUATIONS[place]) for place in (0, 2)]
    assert sum(seen) == 39 + 699 + sum(windows)


def test_texts_that_differ_by_their_last_token_are_read_once(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.generation import scoring

    texts = [scoring.Text([*range(20), last], start) for start in (18, 20) for last in (1, 5, 1)]
    wanted = each_alone(engine.network, texts)
    seen = []
    packed = scoring._packed

    def counting(texts: Any, *rest: Any) -> Any:
        seen.append(len(texts))
        return packed(texts, *rest)

    monkeypatch.setattr(scoring, "_packed", counting)
    found = scoring.score(engine.network, texts, entropy=True)
    assert seen == [2]  # one for each start
    assert largest(found, wanted) < ROUNDING
    assert all(torch.equal(a.greedy, b.greedy) for a, b in zip(found, wanted, strict=True))
    assert found[0].entropy is not None
    assert torch.equal(found[0].entropy, found[1].entropy)
    assert not torch.equal(found[0].log_probs, found[1].log_probs)


def test_a_score_that_is_no_number_is_refused(groups: Any) -> None:
    from hybrid_train.generation.scoring import Text
    from hybrid_train.generation.shared_contexts import score_continuations

    engine = tiny_engine(tiny_job("M"), groups)
    next(engine.network.chunks[0].parameters()).data.fill_(torch.nan)
    texts = [Text([*range(30), 3, last], 30) for last in (2, 4)]
    texts += [Text([*range(30), last, 4], 30) for last in (2, 4)]
    with pytest.raises(UserError, match="is not finite"):
        score_continuations(engine.network, texts)
    assert engine.network.chunks[0].training
