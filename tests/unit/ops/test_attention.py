"""Causal attention against a softmax in loops, and split along the sequence against the whole."""

import pytest
import torch
from torch import Tensor

from hybrid_train.ops import attention
from hybrid_train.ops.attention import causal_attention, split_causal_attention
from hybrid_train.ops.context import continues, in_order, own_chunks
from tests.packed import index_of, spans


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over the keys up to the query's own, one query, head and sequence at a time."""
    length, batch, heads, width = q.shape
    out = torch.zeros(length, batch, heads, width)
    for t in range(length):
        seen = len(k) - length + t + 1  # the last query stands at the last key
        for b in range(batch):
            for head in range(heads):
                group = head // (heads // k.shape[2])
                scores = k[:seen, b, group] @ q[t, b, head] / width**0.5
                out[t, b, head] = scores.softmax(dim=0) @ v[:seen, b, group]
    return out.flatten(2)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (1, 7), (3, 7)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_a_naive_softmax(queries: int, keys: int, kv_heads: int) -> None:
    q = torch.randn(queries, 2, 4, 8)
    k, v = torch.randn(keys, 2, kv_heads, 8), torch.randn(keys, 2, kv_heads, 8)
    torch.testing.assert_close(causal_attention(q, k, v), naive_attention(q, k, v))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_pieces_of_all_ranks_make_the_sequence_again(ranks: int) -> None:
    whole = torch.randn(2, 12, 3)
    parts = [own_chunks(whole, rank, ranks, dim=1) for rank in range(ranks)]
    assert {part.shape for part in parts} == {(2, 12 // ranks, 3)}
    assert torch.equal(in_order(torch.cat(parts, dim=1), ranks, dim=1), whole)


def test_a_length_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="10 does not split into 4 chunks"):
        own_chunks(torch.zeros(10), 0, 2, dim=0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_attention_of_the_parts_is_that_of_the_whole_forward_and_backward(ranks: int) -> None:
    q = torch.randn(12, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(12, 2, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(12, 2, 32, dtype=torch.float64)
    parts = [
        split_causal_attention(own_chunks(q, rank, ranks, dim=0), k, v, rank, ranks)
        for rank in range(ranks)
    ]
    found = in_order(torch.cat(parts), ranks, dim=0)
    expected = causal_attention(q, k, v)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


PACKED = index_of([5, 1, 2, 8], [16], [3, 13])  # along the ends of pieces, within them, over them


def by_documents(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    rows: list[list[Tensor]] = [[] for _ in index]
    for row, start, end in spans(index):
        parts = (t[start:end, row : row + 1] for t in (q, k, v))
        rows[row].append(causal_attention(*parts))
    return torch.cat([torch.cat(row) for row in rows], dim=1)


@pytest.mark.parametrize("short", [1, 6, 256])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_documents_that_share_a_row_attend_as_if_alone(
    ranks: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    q = torch.randn(16, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(16, 3, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parts = [
        split_causal_attention(
            own_chunks(q, rank, ranks, dim=0), k, v, rank, ranks, sequence_index=PACKED
        )
        for rank in range(ranks)
    ]
    found, expected = in_order(torch.cat(parts), ranks, dim=0), by_documents(q, k, v, PACKED)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(16, 3, 32, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_one_masked_product_as_on_a_gpu_equals_span_by_span() -> None:
    q, k, v = torch.randn(3, 16, 3, 2, 8)
    found = attention._attend(q[5:], k, v, PACKED)
    torch.testing.assert_close(found, by_documents(q, k, v, PACKED)[5:])


def test_a_row_continues_but_at_the_ends_of_its_documents() -> None:
    index = index_of([3, 1, 4], [8])
    whole = continues(index, 0, 1)
    assert (~whole).nonzero().tolist() == [[0, 2], [0, 3], [0, 7], [1, 7]]
    for rank in range(2):
        assert torch.equal(continues(index, rank, 2), own_chunks(whole, rank, 2, dim=1))
