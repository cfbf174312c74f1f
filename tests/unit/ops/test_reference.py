"""Another model on the same tokens: its rows beside those of a model, or a refusal.

Heads that are split otherwise over several processes: tests/distributed/test_logits.py.
"""

import pytest
import torch

from hybrid_train.ops.logits import HeadPart
from hybrid_train.ops.reference import Reference, aligned

TOKENS, VOCAB = 5, 10


def head(rows: int, width: int = 3, vocab_size: int = VOCAB) -> HeadPart:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    return HeadPart(weight, vocab_size)


def test_logits_of_a_chunk_are_those_of_its_hidden_states() -> None:
    hidden, other = torch.randn(TOKENS, 3), head(12)
    logits = Reference(hidden, other).logits(slice(1, 4))
    torch.testing.assert_close(logits, (hidden @ other.weight.t())[1:4])


def test_in_one_process_another_padding_and_width_is_no_hindrance() -> None:
    model, other = head(12, width=7), head(16)
    assert aligned(other, model) is other
    Reference(torch.randn(TOKENS, 3), other).require_alike(model)


def test_heads_of_other_vocabularies_are_refused() -> None:
    model, other = head(12), head(12, vocab_size=VOCAB - 1)
    with pytest.raises(ValueError, match="9 from 0 of 9 in the reference, 10 from 0 of 10"):
        Reference(torch.randn(TOKENS, 3), other).require_alike(model)
    with pytest.raises(ValueError, match="has a vocabulary of 9 tokens, the model one of 10"):
        aligned(other, model)
