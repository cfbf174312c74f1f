"""The core of losses on logits: any term, in any number of chunks, against autograd in float64.

What several processes make of it is in tests/distributed.
"""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_train.ops import logits as core
from hybrid_train.ops.logits import (
    CrossEntropy,
    HeadPart,
    LabelScores,
    MostLikely,
    Pullback,
    Term,
    read,
    weighted_sum,
)

TOKENS, WIDTH, ROWS, VOCAB = 21, 3, 12, 10
SPREAD = 30.0  # of the logits: exp alone would overflow
Twin = Callable[[Tensor], Tensor]  # logits of the tokens of the vocabulary [T, V] -> values [T]


def entropy(logits: Tensor, _: slice, head: HeadPart) -> tuple[Tensor, Pullback]:
    """The entropy of each distribution: a second term, which shows that the core takes others."""
    found = head.softmax(logits)
    columns = logits[:, : head.width].to(found.log_sum.dtype)
    probs = found.probs * found.scaled(torch.ones_like(found.log_sum))[:, None]
    values = found.log_sum - head.summed((probs * columns).sum(dim=-1))

    def pullback(weights: Tensor) -> Tensor:
        logs = columns - found.log_sum[:, None]
        out = torch.zeros_like(logits)
        out[:, : head.width] = -weights[:, None] * probs * (logs + values[:, None])
        return out

    return values, pullback


def twin_of_entropy(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)


def labels() -> Tensor:
    return torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))


def twin_of_cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels(), reduction="none")


TERMS: dict[str, tuple[Term, Twin]] = {
    "cross-entropy": (CrossEntropy(labels()), twin_of_cross_entropy),
    "entropy": (entropy, twin_of_entropy),
}


def operands(kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, H], a head [V, H], weights of the tokens [T], one of them 0."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(ROWS, WIDTH, generator=generator) * SPREAD / WIDTH**0.5
    weights = torch.rand(TOKENS, generator=generator)
    weights[4] = 0.0
    return hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_(), weights


def in_chunks_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokens >= WIDTH  # no chunk is smaller
    monkeypatch.setattr(core, "CHUNK_ELEMENTS", tokens * ROWS)


@pytest.mark.parametrize("chunk", [TOKENS, 8, 7], ids="chunk={}".format)
@pytest.mark.parametrize("name", TERMS)
def test_values_and_gradients_equal_those_of_autograd(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(chunk, monkeypatch)
    term, twin = TERMS[name]
    hidden, weight, weights = operands()
    total, values = weighted_sum(hidden, HeadPart(weight, VOCAB), term, weights)
    found = torch.autograd.grad(3 * total, (hidden, weight))

    exact = [operand.detach().double().requires_grad_() for operand in (hidden, weight)]
    expected = twin(exact[0] @ exact[1][:VOCAB].T)
    wanted = torch.autograd.grad(3 * (expected * weights).sum(), exact)
    # Terms of the size of the logits nearly cancel: a few roundings of the largest of them.
    rounding = 8 * SPREAD * 3 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(values, expected.float(), rtol=0, atol=rounding)
    # Each value may be off by that, and counts by its weight.
    spread = rounding * float(weights.abs().sum())
    torch.testing.assert_close(total, (expected * weights).sum().float(), rtol=0, atol=spread)
    for one, other in zip(found, wanted, strict=True):
        atol = rounding * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other.float(), rtol=0, atol=atol)
    assert torch.equal(found[1][VOCAB:], torch.zeros(ROWS - VOCAB, WIDTH))  # padding


@pytest.mark.parametrize("chunk", [TOKENS, 8], ids="chunk={}".format)
def test_the_gradient_of_the_head_is_added_to_its_buffer(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(chunk, monkeypatch)
    hidden, weight, weights = operands()
    term = CrossEntropy(labels())
    total, _ = weighted_sum(hidden, HeadPart(weight, VOCAB), term, weights)
    expected = torch.autograd.grad(total, (hidden, weight))
    buffer = torch.ones(ROWS, WIDTH)
    part = HeadPart(weight, VOCAB, gradient_buffer=buffer)
    total, _ = weighted_sum(hidden, part, term, weights)
    assert torch.equal(buffer, torch.ones(ROWS, WIDTH))  # until the backward pass
    found = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(buffer, 1 + expected[1])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], torch.zeros(ROWS, WIDTH))


def test_no_logits_of_more_than_a_chunk_are_made_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(8, monkeypatch)
    hidden, weight, weights = operands()
    sizes, kept = [], []

    def watched(logits: Tensor, rows: slice, head: HeadPart) -> tuple[Tensor, Pullback]:
        sizes.append(len(logits))
        return CrossEntropy(labels())(logits, rows, head)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weighted_sum(hidden, HeadPart(weight, VOCAB), watched, weights)
    assert sizes == [8, 8, 5]
    assert [len(tensor) for tensor in kept if tensor.shape[-1] == ROWS] == [5]


def test_a_chunk_begins_when_nothing_of_the_one_before_it_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_chunks_of(7, monkeypatch)
    hidden, weight, weights = operands()
    made: list[weakref.ref[Tensor]] = []
    left = []

    def watched(logits: Tensor, rows: slice, head: HeadPart) -> tuple[Tensor, Pullback]:
        left.append(sum(one() is not None for one in made))
        values, pullback = CrossEntropy(labels())(logits, rows, head)

        def remembered(weights: Tensor) -> Tensor:
            gradient = pullback(weights)
            made.extend(map(weakref.ref, (logits, gradient)))
            return gradient

        return values, remembered

    weighted_sum(hidden, HeadPart(weight, VOCAB), watched, weights)
    assert left == [0, 0, 0]


def test_without_gradients_no_pullback_is_called() -> None:
    hidden, weight, weights = operands()

    def fails(_: Tensor) -> Tensor:
        raise AssertionError

    with torch.no_grad():
        _, values = weighted_sum(
            hidden, HeadPart(weight, VOCAB), lambda logits, *_: (logits[:, 0], fails), weights
        )
    assert values.shape == (TOKENS,)


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "head"])
def test_what_is_frozen_gets_no_gradient(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(8, monkeypatch)
    hidden, weight, weights = operands()
    learns = [weight, hidden][frozen]
    part, term = HeadPart(weight, VOCAB), CrossEntropy(labels())
    (expected,) = torch.autograd.grad(weighted_sum(hidden, part, term, weights)[0], learns)
    (hidden, weight)[frozen].requires_grad_(False)
    weighted_sum(hidden, part, term, weights)[0].backward()
    assert (hidden, weight)[frozen].grad is None
    torch.testing.assert_close(learns.grad, expected)


def test_the_gradient_of_a_bfloat16_head_is_summed_over_chunks_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, weights = operands(torch.bfloat16)
    part, term = HeadPart(weight, VOCAB), CrossEntropy(labels())
    one, values = weighted_sum(hidden, part, term, weights)
    assert values.dtype == torch.float32
    expected = torch.autograd.grad(one, (hidden, weight))
    in_chunks_of(8, monkeypatch)
    several, _ = weighted_sum(hidden, part, term, weights)
    found = torch.autograd.grad(several, (hidden, weight))
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        # Each chunk's product is rounded once, to 8 bits.
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=2**-7 * wanted.abs().max().item())


def test_a_chunk_has_no_fewer_tokens_than_there_are_hidden_units() -> None:
    size = core.CHUNK_ELEMENTS
    assert [part.stop - part.start for part in core.chunks(10, 4, size)] == [4, 4, 2]
    assert [part.stop - part.start for part in core.chunks(10, 4, size // 8)] == [8, 2]
    assert len(list(core.chunks(8192, 128, 4096))) == 1


def twin_of_label_scores(logits: Tensor, label: Tensor) -> Tensor:
    """Log-probability, greedy match and entropy by their definitions, [n, 3]."""
    logs = logits.double().log_softmax(dim=-1)
    log_probs = logs.gather(-1, label[:, None]).squeeze(-1)
    greedy = (logits.argmax(dim=-1) == label).double()
    return torch.stack([log_probs, greedy, twin_of_entropy(logits.double())], dim=-1)


@pytest.mark.parametrize("chunk", [TOKENS, 7], ids="chunk={}".format)
def test_scores_of_labels_are_read_at_the_places_that_are_asked_for(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(chunk, monkeypatch)
    hidden, weight, _ = operands()
    weight.data[5] = weight.data[2]  # equals: the first of them is the greedy token
    places = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))[:17]
    logits = (hidden @ weight.T)[places].detach()
    label = labels()[places]
    label[:9] = logits[:9, :VOCAB].argmax(-1)
    label[:4] = torch.where(label[:4] == 2, 5, label[:4])
    found = read(hidden, HeadPart(weight, VOCAB), LabelScores(label, with_entropy=True), places)
    wanted = twin_of_label_scores(logits[:, :VOCAB], label)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found[:, 1].double(), wanted[:, 1])
    rounding = 8 * SPREAD * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=rounding)
    without = read(hidden, HeadPart(weight, VOCAB), LabelScores(label), places)
    assert torch.equal(without, found[:, :2])


def test_the_most_likely_tokens_are_those_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(8, monkeypatch)
    hidden, weight, _ = operands()
    found = read(hidden, HeadPart(weight, VOCAB), MostLikely(4), torch.arange(TOKENS))
    logits = hidden.detach().double() @ weight.detach().double().t()
    values, tokens = logits[:, :VOCAB].topk(4)  # a row of padding is never among them
    assert torch.equal(found[:, :4].long(), tokens)
    rounding = 8 * SPREAD * torch.finfo(torch.float32).eps
    wanted = torch.cat([values, logits[:, :VOCAB].logsumexp(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(found[:, 4:], wanted, rtol=0, atol=rounding)


def test_no_places_have_no_values() -> None:
    hidden, weight, _ = operands()
    none = torch.empty(0, dtype=torch.int64)
    assert read(hidden, HeadPart(weight, VOCAB), LabelScores(none), none).shape == (0, 2)


def test_what_is_read_has_logits_of_no_more_than_a_chunk_of_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_chunks_of(8, monkeypatch)
    hidden, weight, _ = operands()
    sizes = []

    class Watched(LabelScores):
        def __call__(self, logits: Tensor, rows: slice, head: HeadPart) -> Tensor:
            sizes.append(len(logits))
            return super().__call__(logits, rows, head)

    places = torch.arange(0, TOKENS, 2)
    read(hidden, HeadPart(weight, VOCAB), Watched(labels()[places]), places)
    assert sizes == [8, 3]
