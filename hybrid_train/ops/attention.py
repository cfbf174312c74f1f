"""Causal attention with grouped queries, in plain PyTorch.

Dimensions: S queries, K keys, B batch, D head width.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to what is not later; the last query stands at the last key, as in cached decoding.

    Args:
        query: [S, B, heads, D], S <= K.
        key: [K, B, kv_heads, D]; kv_heads divides heads.
        value: like key.

    Returns:
        [S, B, heads * D].
    """
    queries, keys = query.shape[0], key.shape[0]
    q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    mask = None
    if 1 < queries < keys:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = ones.tril(diagonal=keys - queries)
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=queries == keys, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.permute(2, 0, 1, 3).reshape(queries, query.shape[1], -1)


def split_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, rank: int, size: int
) -> Tensor:
    """Attend with the queries of one context-parallel rank to the keys of the whole sequence.

    Args:
        query: the two pieces of this rank, [S, B, heads, D]; see `ops.context`.
        key: of the whole sequence, in its order, [S * size, B, kv_heads, D].
        value: like key.
        rank: of this process.
        size: ranks that share the sequence.

    Returns:
        [S, B, heads * D].
    """
    pieces = []
    for place, queries in zip((rank, 2 * size - 1 - rank), query.chunk(2), strict=True):
        seen = (place + 1) * len(queries)
        pieces.append(causal_attention(queries, key[:seen], value[:seen]))
    return torch.cat(pieces)
