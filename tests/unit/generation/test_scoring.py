"""Scores of texts that share rows against each alone, the cache, and a plain softmax in float64."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybrid_train.hf.read import import_folder
from hybrid_train.hf.write import export_checkpoint
from hybrid_train.schema.model import Rope, RopeScaling
from hybrid_train.schema.problems import UserError
from tests.hf_folders import SHAPES, folder_of
from tests.sampled import sampled
from tests.tiny import (
    EVERY_KIND,
    MEGATRON_WARNINGS,
    RUNTIME,
    VOCAB,
    alone,
    microbatches,
    some_rows,
    tiny_engine,
    tiny_job,
)
from tests.unit.generation.conftest import let_every_layer_be_felt

pytestmark = MEGATRON_WARNINGS
LENGTHS = (2, 9, 33, 1, 17, 70, 16, 5, 24)  # 33 places and more are beyond a row
ROUNDING = 2e-5  # nats: float32 sums of another order, through six layers


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    with alone() as groups:
        yield groups


@pytest.fixture(scope="module", params=[EVERY_KIND, "M*-M-"], ids=["experts", "dense"])
def engine(request: pytest.FixtureRequest, groups: Any) -> Any:
    """An engine whose weights are large enough that every layer is felt."""
    engine = tiny_engine(tiny_job(request.param), groups)
    let_every_layer_be_felt(engine.network.chunks[0])
    return engine


def some_texts() -> list[Any]:
    from hybrid_train.generation.scoring import Text

    generator = torch.Generator().manual_seed(3)
    starts = [1 + (7 * number) % length for number, length in enumerate(LENGTHS)]
    return [
        Text(torch.randint(VOCAB, (length,), generator=generator).tolist(), start)
        for length, start in zip(LENGTHS, starts, strict=True)
    ]


def score(engine: Any, texts: list[Any], **settings: int) -> list[Any]:
    from hybrid_train.generation.scoring import Rows, score

    rows = Rows(**{"length": 32, "tokens": 64} | settings)
    return score(engine.network, texts, rows=rows, entropy=True)


def score_alike(engine: Any) -> None:
    """Score continuations of one context, which is read once."""
    from hybrid_train.generation.scoring import Text
    from hybrid_train.generation.shared_contexts import score_continuations

    score_continuations(engine.network, [Text([*range(40), n, n], 40) for n in range(4)])


def expected(model: Any, text: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, greedy matches and entropies by the definition, from whole logits."""
    tokens = torch.tensor([text.tokens])
    with torch.no_grad():
        logits = model(tokens).logits()[0, text.start - 1 : -1, :VOCAB].double()
    logs, labels = logits.log_softmax(-1), tokens[0, text.start :]
    greedy = logits.argmax(-1) == labels
    return logs.gather(1, labels[:, None])[:, 0], greedy, -(logs.exp() * logs).sum(-1)


def largest(found: list[Any], wanted: list[Tensor]) -> float:
    apart = [(one.log_probs - other).abs() for one, other in zip(found, wanted, strict=True)]
    return float(torch.cat(apart).max())


def test_packed_texts_have_the_scores_of_each_alone_of_the_cache_and_of_whole_logits(
    engine: Any,
) -> None:
    from hybrid_train.generation.cached_model import CachedModel

    texts, model = some_texts(), engine.network.chunks[0].module
    packed = score(engine, texts)
    single = [score(engine, [text], length=1024)[0].log_probs for text in texts]
    model.eval()
    by_definition, cached = [], []
    for text, one in zip(texts, packed, strict=True):
        logs, greedy, entropy = expected(model, text)
        by_definition.append(logs.float())
        assert torch.equal(one.greedy, greedy)
        torch.testing.assert_close(one.entropy, entropy.float(), rtol=0, atol=ROUNDING)
        memory, logits = CachedModel(engine.network, 1), []
        for token in text.tokens[:-1]:
            hidden = memory.read(slice(0, 1), [[token]], [1])
            assert hidden is not None
            logits.append(memory.logits(hidden)[0, 0, :VOCAB])
        labels = torch.tensor(text.tokens[text.start :], dtype=torch.int64)
        kept = torch.stack(logits or [torch.zeros(VOCAB)])[text.start - 1 :][: len(labels)]
        cached.append(kept.log_softmax(-1).gather(1, labels[:, None])[:, 0])
    engine.network.train()
    found = {
        "alone": largest(packed, single),
        "cached": largest(packed, cached),
        "whole logits": largest(packed, by_definition),
    }
    print("largest difference of packed log-probabilities, nats:", found)
    assert max(found.values()) < ROUNDING
    assert any(one.greedy.any() for one in packed)  # not the trivial answer
    assert [len(one.log_probs) for one in packed] == [text.scored for text in texts]


def test_neighbours_and_padding_choose_no_factors_of_longrope(groups: Any) -> None:
    from hybrid_train.generation.scoring import Text
    from hybrid_train.generation.shared_contexts import score_continuations

    job = tiny_job("*-*-")
    job.model.attention.rope = Rope(
        theta=100.0, scaling=RopeScaling.longrope, original_length=144, maximum_length=256,
        short_factors=[1.0] * 4, long_factors=[1.0, 3.0, 8.0, 20.0],
    )  # fmt: skip
    engine = tiny_engine(job, groups)
    let_every_layer_be_felt(engine.network.chunks[0])
    generator = torch.Generator().manual_seed(5)
    # 140 places would be filled up to 160.
    long = torch.randint(VOCAB, (200,), generator=generator).tolist()
    texts = [Text(long[first:last], 1) for first, last in ((0, 20), (9, 29), (0, 141), (0, 200))]
    # Behind one context there are three short texts, and one that is not.
    behind = [Text(long[:last], 101) for last in (104, 108, 112, 200)]
    by_definition = [expected(engine.network.chunks[0], one)[0].float() for one in texts + behind]
    found = score(engine, texts, length=512, tokens=512)
    found += score_continuations(engine.network, behind)
    assert largest(found, by_definition) < ROUNDING


@pytest.mark.parametrize("shape", sampled(SHAPES, "dense H", "Super, latent experts, MTP"))
def test_an_export_has_the_same_scores_in_transformers(
    groups: Any, shape: str, tmp_path: Path
) -> None:
    from hybrid_train.generation.scoring import Rows, score
    from hybrid_train.jobs.networks import load_model

    import_folder(folder_of(shape, tmp_path / "theirs"), tmp_path / "run", None)
    export_checkpoint(tmp_path / "run", tmp_path / "again", None, 2**40)
    network = load_model(str(tmp_path / "run"), RUNTIME, groups=groups).network
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    texts, wanted = some_texts(), []
    found = score(network, texts, rows=Rows(32, 64))
    for text, ours in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([text.tokens]), use_cache=False).logits[0]
        labels = torch.tensor(text.tokens[text.start :], dtype=torch.int64)
        logs = logits[text.start - 1 : -1].log_softmax(-1)
        wanted.append(logs.gather(1, labels[:, None])[:, 0])
        assert torch.equal(ours.greedy, logs.argmax(-1) == labels)
    print(f"{shape}: largest difference from transformers {largest(found, wanted):.2g} nats")
    assert largest(found, wanted) < ROUNDING


def trained(groups: Any, *, scores: bool) -> list[Tensor]:
    """All that two steps leave behind, with texts scored before, between and after, or not."""
    engine = tiny_engine(tiny_job(), groups)
    batches, found = microbatches(some_rows(), 2), []
    for step in range(2):
        if scores:
            score(engine, some_texts())
            score_alike(engine)
        report = engine.step(batches, tokens_seen=64 * step)
        metrics = [report.loss, report.grad_norm, *report.metrics.values()]
        found.append(torch.tensor(metrics, dtype=torch.float64))
    if scores:
        score(engine, some_texts())
        score_alike(engine)
    network = engine.network
    assert all(module.training for module in network.chunks[0].modules())
    assert network.balance_losses.take() is None
    states = [torch.get_rng_state(), *network._updated()]
    return found + [state.detach().clone() for state in states]


def test_a_run_that_scores_between_its_steps_is_equal_to_the_bit(groups: Any) -> None:
    """Weights, optimizer, expert biases and counts of routers, metrics, random state."""
    with torch.random.fork_rng():
        begin = torch.get_rng_state()
        expected = trained(groups, scores=False)
        torch.set_rng_state(begin)
        found = trained(groups, scores=True)
    assert len(found) == len(expected) > 50
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_two_models_are_compared_as_their_whole_logits_are(groups: Any) -> None:
    from hybrid_train.generation.scoring import Rows
    from hybrid_train.generation.scoring import score as plainly

    one, other = (tiny_engine(tiny_job("M*-M-"), groups).network for _ in range(2))
    for network, factor in ((one, 2.0), (other, 1.5)):
        for weight in network.chunks[0].parameters():
            weight.data.mul_(factor)
    texts = some_texts()
    found = plainly(one, texts, rows=Rows(32, 64), against=other)
    same = 0
    for text, scores in zip(texts, found, strict=True):
        mine, theirs = (_logits(network, text) for network in (one, other))
        log_p, log_q = theirs.log_softmax(-1), mine.log_softmax(-1)
        wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(scores.divergence, wanted.float(), rtol=0, atol=ROUNDING)
        assert torch.equal(scores.agrees, theirs.argmax(-1) == mine.argmax(-1))
        same += int(scores.agrees.sum())
    assert 0 < same < sum(text.scored for text in texts)  # not the trivial answer
    assert largest(found, [each.log_probs for each in plainly(one, texts)]) < ROUNDING
    assert all(network.chunks[0].training for network in (one, other))


def _logits(network: Any, text: Any) -> Tensor:
    """Those behind which the scored tokens come, [scored, V], in float64."""
    with network.evaluating():
        logits = network.chunks[0].module(torch.tensor([text.tokens])).logits()
    return logits[0, text.start - 1 : -1, :VOCAB].double()


def test_a_model_of_another_vocabulary_is_not_compared(groups: Any) -> None:
    from hybrid_train.generation.scoring import score as plainly
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model

    job = tiny_job("M")
    built = build_model(job, groups, VOCAB - 1, on_gpu=False)
    other = build_engine(job, built, groups, torch.device("cpu")).network
    with pytest.raises(ValueError, match="60 from 0 of 60 in the reference"):
        plainly(tiny_engine(tiny_job("M"), groups).network, some_texts(), against=other)


def test_a_frozen_network_is_scored_and_stays_frozen(engine: Any) -> None:
    wanted = score(engine, some_texts())
    engine.network.train(False)
    found = score(engine, some_texts())
    assert not engine.network.chunks[0].training
    engine.network.train()
    assert largest(found, [one.log_probs for one in wanted]) == 0


def test_without_entropies_the_rest_is_the_same(engine: Any) -> None:
    from hybrid_train.generation.scoring import score as plainly

    texts = some_texts()
    found = plainly(engine.network, texts)
    assert all(one.entropy is None for one in found)
    assert largest(found, [one.log_probs for one in score(engine, texts, length=2048)]) < ROUNDING


def test_nothing_to_score_is_scored_as_nothing(engine: Any) -> None:
    from hybrid_train.generation.scoring import Text

    assert score(engine, []) == []
    (found,) = score(engine, [Text([3], 1)])
    assert len(found.log_probs) == len(found.greedy) == 0


@pytest.mark.parametrize(
    ("tokens", "start", "message"),
    [
        ([], 1, "has 0 tokens"),
        ([1, 2], 0, "start = 0"),
        ([1, 2], 3, "start = 3"),
        ([1, VOCAB], 1, f"text 1 has token {VOCAB}, .* 0 to {VOCAB - 1}"),  # of the padded head
        ([1, -1], 1, "token -1"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused(
    engine: Any, tokens: list[int], start: int, message: str
) -> None:
    from hybrid_train.generation.scoring import Text

    with pytest.raises(ValueError, match=message):
        score(engine, [Text([1, 2]), Text(tokens, start)])


def test_a_score_that_is_no_number_is_refused_and_the_network_trains_on(groups: Any) -> None:
    engine = tiny_engine(tiny_job("M"), groups)
    next(engine.network.chunks[0].parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="text 0 has a log-probability that is not finite"):
        score(engine, some_texts())
    assert engine.network.chunks[0].training


def test_rows_are_full_of_few_lengths_and_no_text_is_cut(engine: Any) -> None:
    from hybrid_train.generation.scoring import Rows, Text, _microbatches

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 300, (200,), generator=generator).tolist()
    texts = [Text([1] * length, length - 4) for length in [*lengths, 3000]]
    parts = list(_microbatches(engine.network, texts, Rows(512, 2048), None))
    shapes = {batch.tokens.shape for part in parts for batch in part}
    batches = [batch for part in parts for batch in part]
    assert len({length for _, length in shapes}) <= 4
    assert max(length for _, length in shapes) >= 2999
    assert all(rows * length <= 2048 or rows == 1 for rows, length in shapes)
    used = sum(int((~batch.padding).sum()) for batch in batches)
    assert used == sum(length - 1 for length in lengths) + 2999
    assert sum(batch.tokens.numel() for batch in batches) < 1.1 * used
    assert sum(float(batch.loss_weights.sum()) for batch in batches) == 4 * 201
