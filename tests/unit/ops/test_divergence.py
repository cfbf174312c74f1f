"""The divergence of two heads against its definition and autograd in float64.

What several processes make of it is in tests/distributed/test_logits.py.
"""

import math
import sys

import pytest
import torch
from torch import Tensor

from hybrid_train.ops import distribution
from hybrid_train.ops.divergence import Comparison, Distillation
from hybrid_train.ops.logits import HeadPart, read, weighted_sum
from hybrid_train.ops.reference import Reference, TopTokens
from tests.unit.ops.test_logits import ROWS, SPREAD, TOKENS, VOCAB, in_chunks_of, operands

WIDTH = 5  # of the reference, which may be another model than the student


def reference(spread: float = SPREAD, seed: int = 7) -> Reference:
    """Another model: its hidden states, and a head with large rows of padding."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(ROWS, WIDTH, generator=generator) * spread / WIDTH**0.5
    weight[VOCAB:] *= 10
    return Reference(hidden, HeadPart(weight, VOCAB))


def logits_of(reference: Reference) -> Tensor:
    return reference.hidden.double() @ reference.head.weight.double()[:VOCAB].T


def by_definition(theirs: Tensor, mine: Tensor) -> Tensor:
    """KL(theirs || mine) of each token, [T], in float64."""
    log_p, log_q = theirs.log_softmax(-1), mine.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def exactly(
    logits: Tensor,
    targets: list[Tensor],
    labels: Tensor,
    *,
    t: float = 1.0,
    r: float = 0.0,
    c: float = 0.0,
    k: int | None = None,
) -> Tensor:
    """The loss of each token in float64, [T], by its definition; targets are logits, [T, V]."""
    q = (logits / t).log_softmax(-1)
    cross_entropy = -logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    total = torch.zeros_like(cross_entropy)
    for weight, target in zip(WEIGHTS, targets, strict=False):
        p = (target / t).log_softmax(-1)
        entries = (p, q) if k is None else (entries_of(p, p, k), entries_of(q, p, k))
        forward = (entries[0].exp() * (entries[0] - entries[1])).sum(-1)
        backward = (entries[1].exp() * (entries[1] - entries[0])).sum(-1)
        total += weight * t**2 * ((1 - r) * forward + r * backward)
    return (1 - c) * total + c * cross_entropy


def entries_of(log_probs: Tensor, chosen_by: Tensor, k: int) -> Tensor:
    """The k tokens that a distribution holds for the most likely, and one entry for all others."""
    order = chosen_by.argsort(-1, descending=True)
    ranked = log_probs.gather(-1, order)
    return torch.cat([ranked[:, :k], ranked[:, k:].logsumexp(-1, keepdim=True)], dim=-1)


WEIGHTS = (0.75, 0.25)  # of two teachers
SETTINGS = {
    "forward": {},
    "reverse": {"r": 1.0},
    "mixed": {"r": 0.3},
    "warm": {"t": 2.5},
    "with labels": {"c": 0.4},
    "all at once": {"r": 0.3, "t": 0.7, "c": 0.4},
    "top 3": {"k": 3},
    "top 3 at once": {"k": 3, "r": 0.3, "t": 0.7, "c": 0.4},
    "top 1 in reverse": {"k": 1, "r": 1.0},
}


def term(targets: list[Reference], labels: Tensor, settings: dict[str, float]) -> Distillation:
    names = {"t": "temperature", "r": "reverse_share", "c": "cross_entropy_share", "k": "top_k"}
    given = {names[key]: value for key, value in settings.items()}
    weights = WEIGHTS if len(targets) > 1 else (1.0,)
    return Distillation(list(zip(weights, targets, strict=True)), labels, **given)  # type: ignore[arg-type]


def some_labels() -> Tensor:
    return torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("teachers", [1, 2], ids="teachers={}".format)
@pytest.mark.parametrize("chunk", [TOKENS, 7], ids="chunk={}".format)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("spread", [1.0, SPREAD])
def test_the_loss_and_its_gradients_equal_those_of_autograd(
    spread: float, name: str, chunk: int, teachers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(chunk, monkeypatch)
    monkeypatch.setattr(distribution, "_BLOCK_ELEMENTS", 3 * ROWS)
    settings, labels = SETTINGS[name], some_labels()
    others = [reference(spread), reference(0.5 * spread, seed=8)][:teachers]
    hidden, weight, weights = operands()
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    given = WEIGHTS if teachers == 2 else (1.0,)
    monkeypatch.setattr(sys.modules[__name__], "WEIGHTS", given)
    loss = term(others, labels, settings)
    total, values = weighted_sum(hidden, HeadPart(weight, VOCAB), loss, weights)
    found = torch.autograd.grad(3 * total, (hidden, weight))

    expected = exactly(
        exact[0] @ exact[1][:VOCAB].T, [logits_of(one) for one in others], labels, **settings
    )
    wanted = torch.autograd.grad(3 * (expected * weights).sum(), exact)
    rounding = 16 * SPREAD * 3 * torch.finfo(torch.float32).eps  # as for terms of test_logits.py
    rounding *= max(1.0, settings.get("t", 1.0), 1 / settings.get("t", 1.0)) ** 2
    torch.testing.assert_close(values[:, 0], expected.detach().float(), rtol=2e-5, atol=rounding)
    for one, gradient in zip(found, wanted, strict=True):
        atol = rounding * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(one, gradient.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
def test_stored_tokens_of_a_teacher_say_what_the_teacher_itself_would(reverse: float) -> None:
    other, (hidden, weight, weights) = reference(3.0), operands()
    logits, labels = logits_of(other).float(), some_labels()
    top = logits.topk(4)
    stored = TopTokens(top.indices.int(), top.values, logits.logsumexp(-1))
    head, found = HeadPart(weight, VOCAB), []
    for target in (other, stored):
        loss = Distillation([(1.0, target)], labels, reverse_share=reverse, top_k=4)
        total, values = weighted_sum(hidden, head, loss, weights)
        found.append((values, *torch.autograd.grad(total, (hidden, weight))))
    # What is left for the others is 1 - sum here, with the rounding of a float32 that is near 1.
    for one, same in zip(*found, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="stored tokens have the probabilities of"):
        Distillation([(1.0, stored)], labels, temperature=2.0)


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
def test_stored_tokens_that_are_the_whole_vocabulary_leave_nothing_out(reverse: float) -> None:
    other, (hidden, weight, weights) = reference(3.0), operands()
    top = logits_of(other).float().topk(VOCAB)
    stored = TopTokens(top.indices.int(), top.values, top.values.logsumexp(-1))
    head, found = HeadPart(weight, VOCAB), []
    for target in (other, stored):
        loss = Distillation([(1.0, target)], some_labels(), reverse_share=reverse)
        total, values = weighted_sum(hidden, head, loss, weights)
        found.append((values, *torch.autograd.grad(total, (hidden, weight))))
    for one, same in zip(*found, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-4)


def test_stored_tokens_that_rounding_gave_more_than_all_probability_keep_their_shares() -> None:
    """Two tokens of 0.75 and 0.25, whose logits were rounded up by 0.01."""
    logits = torch.tensor([[0.75, 0.25]]).log()
    top = TopTokens(torch.tensor([[2, 0]]), logits + 0.01, torch.zeros(1))
    head = HeadPart(torch.tensor([[0.25], [1e-9], [0.75]]).log().requires_grad_(), 3)
    loss = Distillation([(1.0, top)], torch.zeros(1, dtype=torch.long), agreement=True)
    total, values = weighted_sum(torch.ones(1, 1), head, loss, torch.ones(1))
    (grad,) = torch.autograd.grad(total, head.weight)
    assert values[0, 0] < 1e-6
    assert grad.abs().max() < 1e-6
    assert values[0, 3] == 1


@pytest.mark.parametrize("k", [None, 8], ids="k={}".format)
def test_a_model_agrees_with_itself_where_several_tokens_are_the_most_likely(k: int | None) -> None:
    """As is common in half precision; the order in which a sort leaves equals is no answer."""
    generator, tokens = torch.Generator().manual_seed(0), 300
    hidden, labels = torch.eye(50), torch.zeros(50, dtype=torch.long)
    weight = torch.randint(4, (tokens, 50), generator=generator).float()
    weight.scatter_(0, torch.randint(tokens, (3, 50), generator=generator), 9.0)
    head = HeadPart(weight, tokens)
    loss = Distillation([(1.0, Reference(hidden, head))], labels, top_k=k, agreement=True)
    _, values = weighted_sum(hidden, head, loss, torch.ones(50))
    assert (values[:, 3] == 1).all()


@pytest.mark.parametrize(
    "name", [name for name in SETTINGS if "label" not in name and "once" not in name]
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    other = reference()
    hidden = other.hidden.clone().requires_grad_()
    weight = other.head.weight.clone().requires_grad_()
    loss = term([other], some_labels(), SETTINGS[name])
    total, values = weighted_sum(hidden, HeadPart(weight, VOCAB), loss, torch.ones(TOKENS))
    grads = torch.autograd.grad(total, (hidden, weight))
    rounding = 8 * SPREAD * torch.finfo(torch.float32).eps if "top" in name else 0.0
    for one in (values[:, :2], *grads):
        assert one.abs().max() <= rounding


def test_agreement_is_that_of_the_greedy_tokens_with_the_first_teacher() -> None:
    others, (hidden, weight, weights) = [reference(), reference(seed=8)], operands()
    loss = Distillation(list(zip(WEIGHTS, others, strict=True)), some_labels(), agreement=True)
    _, values = weighted_sum(hidden, HeadPart(weight, VOCAB), loss, weights)
    mine = (hidden.double() @ weight.double()[:VOCAB].T).argmax(-1)
    assert torch.equal(values[:, 3] == 1, mine == logits_of(others[0]).argmax(-1))


@pytest.mark.parametrize("chunk", [TOKENS, 7], ids="chunk={}".format)
def test_what_is_read_is_the_divergence_and_whether_the_greedy_tokens_are_equal(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(chunk, monkeypatch)
    other, (hidden, weight, _) = reference(), operands()
    places = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))[:17]
    own = Reference(other.hidden[places], other.head)
    found = read(hidden, HeadPart(weight, VOCAB), Comparison(own), places)
    mine = (hidden.double() @ weight.double()[:VOCAB].T)[places].detach()
    theirs = logits_of(other)[places]
    same = theirs.argmax(-1) == mine.argmax(-1)
    assert 0 < same.sum() < len(same)
    assert torch.equal(found[:, 1] == 1, same)
    torch.testing.assert_close(found[:, 0], by_definition(theirs, mine).float(), rtol=1e-5, atol=0)
    assert not found.requires_grad


@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-4, 1e-2])
def test_models_that_are_nearly_equal_have_a_small_divergence_and_never_one_below_zero(
    apart: float,
) -> None:
    """A difference of two sums of the size of logits would have an error of 1e-6 here."""
    other = reference(spread=3.0)
    moved = other.head.weight + apart * torch.randn_like(other.head.weight)
    comparison = Comparison(other)
    found = read(other.hidden, HeadPart(moved, VOCAB), comparison, torch.arange(TOKENS))[:, 0]
    wanted = by_definition(logits_of(other), other.hidden.double() @ moved.double()[:VOCAB].T)
    assert (found >= 0).all()
    # A logit is off by some roundings of 10, and the divergence is half the square of it.
    rounding = 8 * 10 * torch.finfo(torch.float32).eps
    bound = (wanted.sqrt() + rounding) ** 2 - wanted
    assert ((found - wanted).abs() <= bound + 1e-6 * wanted).all()


def test_a_token_that_one_model_thinks_impossible_costs_what_the_other_gives_it() -> None:
    """Logits 300 apart: the probability of the second token is 0 in float32."""
    one = Reference(torch.ones(1, 1), HeadPart(torch.tensor([[0.0], [0.0]]), 2))
    head = HeadPart(torch.tensor([[300.0], [0.0]]), 2)
    (values,) = read(torch.ones(1, 1), head, Comparison(one), torch.arange(1)).tolist()
    assert values[0] == pytest.approx(150 - math.log(2), rel=1e-6)
    sure = Reference(torch.ones(1, 1), head)
    flat = HeadPart(one.head.weight, 2)
    (values,) = read(torch.ones(1, 1), flat, Comparison(sure), torch.arange(1)).tolist()
    assert values[0] == pytest.approx(math.log(2), rel=1e-6)


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    other, (hidden, weight, weights) = reference(), operands()
    head, refused = HeadPart(weight, VOCAB - 1), "10 from 0 of 10 in the reference, 9 from 0 of 9"
    with pytest.raises(ValueError, match=refused):
        read(hidden, head, Comparison(other), torch.arange(TOKENS))
    with pytest.raises(ValueError, match=refused):
        weighted_sum(hidden, head, Distillation([(1.0, other)], some_labels()), weights)
