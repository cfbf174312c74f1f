"""Causal attention with grouped queries, in plain PyTorch.

Dimensions: S queries, K keys, B batch, D head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHORT = 256  # tokens up to which consecutive documents share one masked product on a CPU


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, sequence_index: Tensor | None = None
) -> Tensor:
    """Attend to what is not later; the last query stands at the last key, as on a context rank.

    Args:
        query: [S, B, heads, D], S <= K.
        key: [K, B, kv_heads, D]; kv_heads divides heads.
        value: like key.
        sequence_index: number of the document of each key, [B, K], non-decreasing; a query sees its
            own document alone. None is one document.

    Returns:
        [S, B, heads * D].
    """
    if sequence_index is None:
        return _attend(query, key, value, None)
    if query.device.type != "cpu":
        return _attend(query, key, value, sequence_index)
    rows = (part.split(1, dim=1) for part in (query, key, value))
    each = zip(*rows, sequence_index.split(1), strict=True)
    return torch.cat([_attend_by_spans(q, k, v, index) for q, k, v, index in each], dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, index: Tensor | None) -> Tensor:
    """Attend in one product over all pairs, with a mask where causality alone does not do."""
    queries, keys = query.shape[0], key.shape[0]
    q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    mask = None
    if index is not None or 1 < queries < keys:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = ones.tril(diagonal=keys - queries)
        if index is not None:
            mask = (mask & (index[:, -queries:, None] == index[:, None]))[:, None]
    causal = mask is None and queries == keys
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.permute(2, 0, 1, 3).reshape(queries, query.shape[1], -1)


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, *, causal: bool = False
) -> Tensor:
    """Attend to kept keys and values, of which each query sees a part.

    Args:
        query: [B, heads, W, D].
        key: [B, kv_heads, K, D]; kv_heads divides heads.
        value: like key.
        seen: whether a query sees a key, [B, 1, W, K]; None: all do.
        causal: no query sees a later key; W = K, and `seen` is None.

    Returns:
        [B * W, heads * D], the tokens of a row one after the other.
    """
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=seen, is_causal=causal, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _attend_by_spans(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Attend within the documents of one row, B = 1: pairs of two documents cost nothing."""
    ends = list(_ends_of_spans(index[0]))
    starts = [0, *ends[:-1]]
    first = len(key) - len(query)  # the key where the first query stands
    keys = [end - start for start, end in zip(starts, ends, strict=True)]
    queries = [max(0, end - max(start, first)) for start, end in zip(starts, ends, strict=True)]
    # Split, not sliced: the gradient of every slice would be as long as the row.
    spans = zip(
        query.split(queries), key.split(keys), value.split(keys), index.split(keys, dim=1),
        strict=True,
    )  # fmt: skip
    return torch.cat([
        _attend(q, k, v, None if bool(part[0, 0] == part[0, -1]) else part)
        for q, k, v, part in spans
        if len(q)
    ])  # fmt: skip


def _ends_of_spans(index: Tensor) -> Iterator[int]:
    """Cut a row [K] between documents: a long one alone, short ones together up to `SHORT`."""
    ends = (index[1:] != index[:-1]).nonzero().squeeze(1) + 1
    start = last = 0
    for end in [*ends.tolist(), len(index)]:
        if last > start and end - start > SHORT:
            yield last
            start = last
        last = end
    yield last


def split_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rank: int,
    size: int,
    *,
    sequence_index: Tensor | None = None,
) -> Tensor:
    """Attend with the queries of one context-parallel rank to the keys of the whole sequence.

    Args:
        query: the two chunks of this rank, [S, B, heads, D]; see `ops.context`.
        key: of the whole sequence, in its order, [S * size, B, kv_heads, D].
        value: like key.
        rank: of this process.
        size: ranks that share the sequence.
        sequence_index: as in `causal_attention`, of the whole sequence, [B, S * size].

    Returns:
        [S, B, heads * D].
    """
    chunks = []
    for place, queries in zip((rank, 2 * size - 1 - rank), query.chunk(2), strict=True):
        seen = (place + 1) * len(queries)
        index = None if sequence_index is None else sequence_index[:, :seen]
        chunks.append(causal_attention(queries, key[:seen], value[:seen], index))
    return torch.cat(chunks)
