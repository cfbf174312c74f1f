"""A distribution by columns against its definition in float64; padding has no part in it."""

import math

import pytest
import torch
from torch import Tensor

from hybrid_train.ops import distribution
from hybrid_train.ops.distribution import Columns, toward
from hybrid_train.ops.logits import HeadPart

VOCAB, ROWS, TOKENS = 11, 16, 7
HEAD = HeadPart(torch.zeros(ROWS, 1), VOCAB)


def some_logits() -> Tensor:
    found = 5 * torch.randn(TOKENS, ROWS, generator=torch.Generator().manual_seed(3))
    found[:, VOCAB:] = 50.0  # of padding
    return found


def log_probs_of(logits: Tensor, scale: float) -> Tensor:
    return (logits[:, :VOCAB].double() * scale).log_softmax(-1)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_probabilities_are_those_of_the_tokens_in_blocks_of_any_size(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "_BLOCK_ELEMENTS", 3 * ROWS)  # blocks of 3, 3 and 1
    logits = some_logits()
    found = Columns.of(logits, HEAD, scale)
    blocks = torch.cat([found.log_probs(block) for block in found.blocks()])
    expected = log_probs_of(logits, scale)
    torch.testing.assert_close(blocks.double(), expected, rtol=1e-5, atol=1e-5)
    tokens = torch.tensor([[0, VOCAB - 1]] * TOKENS)
    picked = found.log_probs_of(tokens).double()
    torch.testing.assert_close(picked, expected[:, [0, VOCAB - 1]], rtol=1e-5, atol=1e-5)


def test_the_rest_is_the_sum_over_all_other_tokens_and_nothing_where_there_are_none() -> None:
    logits = some_logits()
    found, expected = Columns.of(logits, HEAD, 1.0), log_probs_of(logits, 1.0)
    tokens = expected.topk(4).indices
    others = expected.scatter(-1, tokens, -math.inf).logsumexp(-1)
    torch.testing.assert_close(found.rest(tokens).double(), others, rtol=1e-5, atol=1e-5)
    everything = torch.arange(VOCAB).expand(TOKENS, -1)
    assert (found.rest(everything) == -math.inf).all()


def test_a_share_of_the_divergence_is_exact_near_zero_and_finite_far_from_it() -> None:
    p = torch.tensor([0.3, 0.3, 1e-30], dtype=torch.float64)
    d = torch.tensor([1e-9, -2.0, 65.0], dtype=torch.float64)
    q = p * d.exp()
    found = toward(p.float(), d.float(), q.log().float())
    expected = torch.stack([p[0] * d[0] ** 2 / 2, *(q - p - p * d)[1:]])  # the series at 1e-9
    assert (found >= 0).all()
    torch.testing.assert_close(found[1:].double(), expected[1:], rtol=1e-5, atol=0)
    assert found[0] < 1e-15
