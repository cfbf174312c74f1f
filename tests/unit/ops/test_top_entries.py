"""Tokens that are told apart, and one entry for all others: together they are all there is."""

import torch

from hybrid_train.ops.distribution import Columns
from hybrid_train.ops.reference import TopTokens
from hybrid_train.ops.top_entries import TopEntries
from tests.unit.ops.test_distribution import HEAD, TOKENS, VOCAB, log_probs_of, some_logits


def test_the_most_likely_tokens_and_the_rest_have_all_probability() -> None:
    logits = some_logits()
    found, expected = TopEntries.of(Columns.of(logits, HEAD, 1.0), 3), log_probs_of(logits, 1.0)
    values, tokens = expected.topk(3)
    assert found.tokens.equal(tokens)
    assert found.greedy.equal(tokens[:, 0])
    torch.testing.assert_close(found.log_probs.double(), values, rtol=1e-5, atol=1e-5)
    assert found.rest is not None
    total = found.log_probs.exp().sum(-1) + found.rest.exp()
    torch.testing.assert_close(total, torch.ones(TOKENS))


def test_what_was_stored_is_what_the_distribution_says() -> None:
    logits = some_logits()
    columns = Columns.of(logits, HEAD, 1.0)
    tokens = logits[:, :VOCAB].topk(3).indices
    stored = TopTokens(tokens.int(), logits.gather(-1, tokens), columns.log_sum)
    found, expected = (
        TopEntries.stored(stored, slice(0, TOKENS), columns), TopEntries.of(columns, 3),
    )  # fmt: skip
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    assert found.rest is not None
    assert expected.rest is not None
    torch.testing.assert_close(found.rest.exp(), expected.rest.exp(), rtol=0, atol=1e-6)
    part = TopEntries.stored(stored, slice(2, 5), columns)
    assert part.tokens.equal(tokens[2:5])


def test_of_equals_the_first_token_is_the_likeliest() -> None:
    tokens = torch.tensor([[7, 2, 9]])
    equal = TopEntries(tokens, torch.tensor([[-1.0, -1.0, -3.0]]), None)
    assert equal.greedy.tolist() == [2]
