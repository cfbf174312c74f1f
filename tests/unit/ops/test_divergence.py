"""The divergence of two heads against its definition and autograd in float64.

What several processes make of it is in tests/distributed/test_logits.py.
"""

import math

import pytest
import torch
from torch import Tensor

from hybrid_train.ops.divergence import Comparison, Divergence, Reference
from hybrid_train.ops.logits import HeadPart, read, weighted_sum
from tests.unit.ops.test_logits import ROWS, SPREAD, TOKENS, VOCAB, in_chunks_of, operands

WIDTH = 5  # of the reference, which may be another model than the student


def reference(spread: float = SPREAD) -> Reference:
    """Another model: its hidden states, and a head with large rows of padding."""
    generator = torch.Generator().manual_seed(7)
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


@pytest.mark.parametrize("chunk", [TOKENS, 8, 7], ids="chunk={}".format)
@pytest.mark.parametrize("spread", [1.0, SPREAD])
def test_divergence_and_its_gradients_equal_those_of_autograd(
    spread: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(chunk, monkeypatch)
    other, (hidden, weight, weights) = reference(spread), operands()
    total, values = weighted_sum(hidden, HeadPart(weight, VOCAB), Divergence(other), weights)
    found = torch.autograd.grad(3 * total, (hidden, weight))

    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    expected = by_definition(logits_of(other), exact[0] @ exact[1][:VOCAB].T)
    wanted = torch.autograd.grad(3 * (expected * weights).sum(), exact)
    rounding = 8 * SPREAD * 3 * torch.finfo(torch.float32).eps  # as for terms of test_logits.py
    torch.testing.assert_close(values, expected.detach().float(), rtol=1e-5, atol=rounding)
    for one, gradient in zip(found, wanted, strict=True):
        atol = rounding * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(one, gradient.float(), rtol=0, atol=atol)


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


def test_heads_of_other_vocabularies_are_refused() -> None:
    other, (hidden, weight, _) = reference(), operands()
    with pytest.raises(ValueError, match="10 from 0 of 10 in the reference, 9 from 0 of 9"):
        read(hidden, HeadPart(weight, VOCAB - 1), Comparison(other), torch.arange(TOKENS))
