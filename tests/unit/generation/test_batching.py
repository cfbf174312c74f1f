"""Requests in one batch against each alone, without a cache and without drafts."""

import gc
import random
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from hybrid_train.schema.problems import UserError
from tests.tiny import MEGATRON_WARNINGS
from tests.unit.generation.conftest import (
    VOCAB,
    Build,
    full_logits,
    some_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hybrid_train.generation.requests import NewTokens, Request
    from hybrid_train.training.network import Network

pytestmark = MEGATRON_WARNINGS

ONE_BLOCK = "MEM*M-/*E"


def requests(number: int, longest: int, **settings: object) -> "list[Request]":
    """Prompts of length 1 to `longest` that want 1 to 20 tokens."""
    from hybrid_train.generation.requests import Request

    draw = random.Random(number)
    return [
        Request(
            prompt=[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))],
            **{"max_new_tokens": draw.randint(1, 20), **settings},  # type: ignore[arg-type]
        )
        for _ in range(number)
    ]


def answers(network: "Network", asked: "Sequence[Request]", **settings: object) -> list[list[int]]:
    """The tokens of each answer, checked to be over once and no later than asked."""
    from hybrid_train.generation.batching import Batching, stream

    found: list[list[NewTokens]] = [[] for _ in asked]
    batching = Batching(vocab_size=VOCAB, **settings)  # type: ignore[arg-type]
    for new in stream(network, asked, batching):
        found[new.request].append(new)
    for parts, request in zip(found, asked, strict=True):
        assert all(part.finish is None for part in parts[:-1])
        assert parts[-1].finish is not None
        assert sum(len(part.tokens) for part in parts) <= request.max_new_tokens
    return [[token for part in parts for token in part.tokens] for parts in found]


@cache
def greedy_alone(build: Build, pattern: str, number: int, longest: int) -> list[list[int]]:
    """The answers that whole passes give, token by token."""
    network, found = build(pattern), []
    for request in requests(number, longest):
        tokens = list(request.prompt)
        for _ in range(request.max_new_tokens):
            logits = full_logits(network, torch.tensor([tokens]))[0, -1, :VOCAB]
            tokens.append(int(logits.argmax()))
        found.append(tokens[len(request.prompt) :])
    return found


@pytest.mark.parametrize("chunk", [512, 7], ids="prompts in pieces of {}".format)
@pytest.mark.parametrize(("rows", "drafts"), [(1, 0), (8, 0), (3, 2), (30, 7), (8, None)])
def test_answers_are_those_of_each_request_alone(
    build: Build, rows: int, drafts: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_train.generation.batching.PROMPT_CHUNK", chunk)
    found = answers(build(ONE_BLOCK), requests(24, 60), rows=rows, drafts=drafts)
    assert found == greedy_alone(build, ONE_BLOCK, 24, 60)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["MM-M*-", "MEM*ME", "*-*-"])
def test_64_prompts_of_length_1_to_300_in_one_batch_equal_each_alone(
    build: Build, pattern: str
) -> None:
    found = answers(build(pattern), requests(64, 300), rows=64)
    assert found == greedy_alone(build, pattern, 64, 300)


@pytest.mark.parametrize("drafts", [0, 3])
def test_sampled_answers_depend_on_their_seed_and_on_nothing_else(
    build: Build, drafts: int
) -> None:
    from hybrid_train.generation.sampling import Sampling

    network = build(ONE_BLOCK)
    sampling = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2)
    asked = requests(9, 20, sampling=sampling)
    first = answers(network, asked, rows=1)
    torch.rand(1)  # the global generator does not matter
    assert answers(network, asked, rows=5, drafts=drafts) == first
    others = [replace(one, sampling=replace(sampling, seed=5)) for one in asked]
    assert answers(network, others, rows=5, drafts=drafts) != first


@pytest.mark.parametrize("drafts", [0, 4])
def test_an_answer_is_over_with_its_end_token_and_the_others_go_on(
    build: Build, drafts: int
) -> None:
    network = build(ONE_BLOCK)
    asked = requests(8, 20, max_new_tokens=20)
    free = answers(network, asked, rows=4)
    end = free[0][3]
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in free]
    asked = [replace(one, ends=frozenset([end])) for one in asked]
    assert answers(network, asked, rows=4, drafts=drafts) == expected
    assert len({len(tokens) for tokens in expected}) > 1


class Pattern:
    """Forces a token at each third place, and ends an answer at its eighth token."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def forced(self) -> int | None:
        return 11 if len(self.taken) % 3 == 2 else None

    def take(self, token: int) -> bool:
        self.taken.append(token)
        return len(self.taken) == 8


@pytest.mark.parametrize("drafts", [0, 4])
def test_watchers_force_tokens_and_end_answers_also_within_drafts(
    build: Build, drafts: int
) -> None:
    network = build(ONE_BLOCK)
    asked = requests(6, 20, watch=Pattern, max_new_tokens=30)
    found = answers(network, asked, rows=4, drafts=drafts)
    assert all(tokens[2::3] == [11, 11] and len(tokens) == 8 for tokens in found)
    assert found == answers(network, asked, rows=1)
    for tokens, request in zip(found, asked, strict=True):
        logits = full_logits(network, torch.tensor([[*request.prompt, *tokens]]))[0]
        chosen = logits[len(request.prompt) - 1 : -1, :VOCAB].argmax(-1).tolist()
        assert [t for i, t in enumerate(tokens) if i % 3 != 2] == [
            t for i, t in enumerate(chosen) if i % 3 != 2
        ]


@pytest.mark.parametrize("drafts", [0, 3])
def test_log_probabilities_are_those_of_a_whole_pass(build: Build, drafts: int) -> None:
    from hybrid_train.generation.batching import Batching, stream

    network = build(ONE_BLOCK)
    asked = requests(5, 20, max_new_tokens=12)
    found: list[list[tuple[int, float]]] = [[] for _ in asked]
    batching = Batching(vocab_size=VOCAB, rows=3, drafts=drafts, log_probs=True)
    for new in stream(network, asked, batching):
        found[new.request] += zip(new.tokens, new.log_probs, strict=True)
    for pairs, request in zip(found, asked, strict=True):
        tokens = [token for token, _ in pairs]
        logits = full_logits(network, torch.tensor([[*request.prompt, *tokens]]))[0]
        expected = logits[len(request.prompt) - 1 : -1, :VOCAB].log_softmax(-1)
        for (token, value), row in zip(pairs, expected, strict=True):
            assert value == pytest.approx(row[token].item(), abs=1e-4)


def test_padding_of_the_vocabulary_is_never_chosen(build: Build) -> None:
    from hybrid_train.generation.batching import Batching, stream
    from hybrid_train.generation.requests import Request
    from hybrid_train.generation.sampling import Sampling

    asked = [Request(prompt=[1], sampling=Sampling(temperature=100.0), max_new_tokens=50)]
    new = stream(build("M*"), asked, Batching(vocab_size=3))
    assert {token for part in new for token in part.tokens} == {0, 1, 2}


def test_requests_are_taken_as_rows_become_free(build: Build) -> None:
    from hybrid_train.generation.batching import Batching, stream

    taken = 0

    def count() -> "Request":
        nonlocal taken
        taken += 1
        return asked[taken - 1]

    asked = requests(6, 5, max_new_tokens=3)
    new = stream(build("M*"), (count() for _ in asked), Batching(vocab_size=VOCAB, rows=2))
    next(iter(new))
    assert taken == 2


def live_bytes() -> int:
    """Bytes of all tensors that anything still refers to."""
    gc.collect()
    return sum(one.nbytes for one in gc.get_objects() if issubclass(type(one), torch.Tensor))


def test_memory_is_flat_over_1000_requests(build: Build) -> None:
    from hybrid_train.generation.batching import Batching, stream

    asked = requests(1000, 12, max_new_tokens=2)
    over, seen = 0, []
    for new in stream(build("MEM*M-"), iter(asked), Batching(vocab_size=VOCAB, rows=50)):
        over += new.finish is not None
        if new.finish is not None and over % 100 == 0:
            seen.append(live_bytes())
    assert len(seen) == 10
    assert max(seen[5:]) <= max(seen[:5])


def test_logits_that_are_not_finite_end_the_generation_with_the_request(build: Build) -> None:
    from hybrid_train.generation.batching import Batching, stream

    network = build("M*")
    decay = network.chunks[0].decoder.layers[0].mixer.A_log
    kept = decay.data.clone()
    decay.data.fill_(float("nan"))
    try:
        new = stream(network, requests(1, 3), Batching(vocab_size=VOCAB))
        with pytest.raises(UserError, match=r"request 0: logits behind token \d+ are not finite"):
            next(new)  # and no token is given out
    finally:
        decay.data.copy_(kept)


@pytest.mark.parametrize("new", [4, 12])
def test_drafts_behind_the_end_of_an_answer_are_neither_right_nor_wrong(
    build: Build, new: int
) -> None:
    """All weights are zero: the first token is always the likeliest, and every draft is right."""
    from hybrid_train.generation.batching import Batching, stream
    from hybrid_train.generation.drafting import Record

    network, record = build(ONE_BLOCK), Record()
    head = network.chunks[0].output_layer.weight
    kept = head.data.clone()
    head.data.zero_()
    try:
        asked = requests(3, 5, max_new_tokens=new)
        found = list(stream(network, asked, Batching(vocab_size=VOCAB, drafts=7), record))
    finally:
        head.data.copy_(kept)
    assert sum(len(one.tokens) for one in found) == 3 * new
    assert record.accepted == record.drafted
    assert record.acceptance_length == (8.0 if new == 12 else 1.0)


def test_an_empty_prompt_and_drafts_without_a_block_are_refused(build: Build) -> None:
    from hybrid_train.generation.requests import Request

    with pytest.raises(ValueError, match="needs at least one token, none negative"):
        Request(prompt=[])
    with pytest.raises(ValueError, match="max_new_tokens = 0: must be at least 1"):
        Request(prompt=[1], max_new_tokens=0)
    with pytest.raises(ValueError, match="request 0 has token 61; the vocabulary ends at 60"):
        answers(build("M*"), [Request(prompt=[VOCAB])])
    with pytest.raises(ValueError, match="rows of at least 1"):
        answers(build("M*"), requests(1, 3), rows=0)
    with pytest.raises(UserError, match="has no MTP block that could draft; set drafts=0"):
        answers(build("M*"), requests(1, 3), drafts=2)


def test_generation_leaves_no_trace_in_a_model_that_trains(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from hybrid_train.generation.batching import Batching, stream

    # A backward pass without a step leaves a scale there that no step of another test can set.
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    network = build(ONE_BLOCK)
    network.train(True)
    try:
        model, tokens = network.chunks[0], some_tokens(1, 8).to(network.device)
        before = model(tokens).logits()
        state = {name: value.clone() for name, value in model.named_buffers()}
        answers(network, requests(3, 9), drafts=2)
        left = stream(network, requests(3, 9), Batching(vocab_size=VOCAB))
        next(left)
        left.close()  # type: ignore[attr-defined]
        assert all(part.training for part in model.modules())
        for name, value in model.named_buffers():  # the expert load among them
            torch.testing.assert_close(value, state[name], rtol=0, atol=0)
        after = model(tokens).logits()
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        after.sum().backward()
    finally:
        network.train(False)
        for parameter in network.chunks[0].parameters():
            parameter.grad = None


def test_changed_weights_are_used_at_once(build: Build) -> None:
    network, asked = build("M"), requests(2, 6, max_new_tokens=20)
    answers(network, asked)
    decay = network.chunks[0].decoder.layers[0].mixer.A_log
    kept = decay.data.clone()
    decay.data.fill_(-6.0)
    try:
        found = answers(network, asked)
        for tokens, request in zip(found, asked, strict=True):
            logits = full_logits(network, torch.tensor([[*request.prompt, *tokens]]))[0]
            assert tokens == logits[len(request.prompt) - 1 : -1, :VOCAB].argmax(-1).tolist()
    finally:
        decay.data.copy_(kept)
