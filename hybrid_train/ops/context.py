"""How a sequence is split over the ranks of context parallelism: one early and one late chunk each.

A sequence of length L is cut into 2 * P chunks; rank r of P holds the chunks r and 2P - 1 - r, so
that causal attention is the same work for every rank.

Documents that share a row do not change that: the row is cut, wherever they end.

Source: megatron-core 0.19.2, utils.py, get_batch_on_this_cp_rank.
"""

import torch
from torch import Tensor


def own_chunks(whole: Tensor, rank: int, size: int, *, dim: int) -> Tensor:
    """Return the two chunks of a rank, one behind the other: length L -> L / size along `dim`.

    Raises:
        ValueError: if the length is no multiple of 2 * size.
    """
    if size == 1:
        return whole
    length = whole.shape[dim]
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} does not split into {2 * size} chunks")
    chunks = whole.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[-1 - rank]], dim)


def in_order(gathered: Tensor, size: int, *, dim: int) -> Tensor:
    """Put the chunks of all ranks, gathered rank after rank, into the order of the sequence."""
    chunks = gathered.chunk(2 * size, dim)
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])], dim)


def continues(sequence_index: Tensor, rank: int, size: int) -> Tensor:
    """Tell for each token of a rank whether the next one of its row is of the same document.

    Args:
        sequence_index: number of the document of each token of whole rows, [B, L].
        rank: of this process.
        size: ranks that share the rows.

    Returns:
        [B, L / size], bool; False at the end of a row.
    """
    last = sequence_index.new_zeros(len(sequence_index), 1, dtype=torch.bool)
    same = torch.cat((sequence_index[:, 1:] == sequence_index[:, :-1], last), dim=1)
    return own_chunks(same, rank, size, dim=1)
