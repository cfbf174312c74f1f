"""Several documents in one row: how core's layers learn where they end.

The boundaries travel as core's `packed_seq_params`, through every pipeline stage and recomputed
layer, but rows stay rows: [S, B, H], cut for context parallelism wherever documents end. Core
(0.19.2) wants a single row in which every document is cut and padded for itself instead; what reads
it so is replaced below, with the line of core that makes it necessary.

Dimensions: B rows, L tokens of a row, S of them on this context-parallel rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm import mamba_context_parallel, mamba_mixer
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.moe import router
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hybrid_train.ops.context import continues
from hybrid_train.schema.problems import UserError


@dataclass
class PackedRows(PackedSeqParams):
    """Where the documents of whole rows end: `seq_idx` [B, L], which Mamba's kernels read too.

    Attributes:
        continues: whether the next token is of the same document, for this rank's part, [B, S].
    """

    continues: Tensor | None = None

    @cached_property
    def one_after_another(self) -> PackedSeqParams:
        """All documents of all rows as one list, the form that Transformer Engine reads."""
        index = self.seq_idx
        starts = torch.ones_like(index, dtype=torch.bool)
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
        ends = starts.flatten().nonzero().squeeze(1)
        ends = torch.cat((ends, ends.new_tensor([index.numel()]))).int()
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=index.shape[1],
            max_seqlen_kv=index.shape[1],
        )


def arguments(
    sequence_index: Tensor,
    padding: Tensor | None,
    groups: ProcessGroupCollection,
    config: TransformerConfig,
) -> dict[str, Any]:
    """Return what core's stacks and MTP blocks are to be told of packed rows.

    Args:
        sequence_index: number of the document of each token of whole rows, [B, L].
        padding: tokens of this rank that routers do not count, [B, S].
        groups: process groups of the model.
        config: Megatron's.
    """
    own = continues(sequence_index, groups.cp.rank(), groups.cp.size())
    index = sequence_index.int().contiguous()
    if padding is not None and config.sequence_parallel:
        # Routers see the tensor rank's part of the sequence; the hybrid model does not cut the mask
        # for them (hybrid_model.py 521, as gpt_model.py 352 does).
        padding = padding.chunk(groups.tp.size(), dim=1)[groups.tp.rank()]
    rows = PackedRows(qkv_format="sbhd", seq_idx=index, continues=own)
    return {"packed_seq_params": rows, "padding_mask": padding}


def use_packed_rows() -> None:
    """Let core keep documents apart that share a row."""
    # mamba_context_parallel.py 360, 398: cuts of each document, by a kernel of Transformer Engine.
    for name, function in (
        ("_undo_attention_load_balancing", _undo_balancing),
        ("_redo_attention_load_balancing", _redo_balancing),
    ):
        _replace(mamba_context_parallel, name, function)
    # multi_token_prediction.py 238: likewise, and document by document.
    _replace(multi_token_prediction, "roll_tensor", _roll)
    # router.py 738: a mask [T] against a map [T, experts].
    _replace(router.TopKRouter, "_apply_expert_bias", _count_tokens)
    # router.py 632, by way of moe_utils.py 276: the balance loss is scaled by the rank's own share.
    _replace(router, "get_tokens_per_expert_and_token_count", _tokens_of_experts)
    # moe_utils.py 141: every row is taken for one of mean length.
    _replace(router, "switch_load_balancing_loss_func", _balance_loss)


def use_plain_packing() -> None:
    """Let core's Mamba mixer take a sequence index without mamba-ssm (mamba_mixer.py 1490)."""
    _replace(mamba_mixer, "_check_mamba_sequence_packing_support", lambda **_: (True, None))


def shift(x: Tensor, context_group: Any, continued: Tensor | None) -> Tensor:
    """Move [B, S] one token ahead, as MTP does from depth to depth; zeros behind the end.

    Args:
        x: this context-parallel rank's part of the rows.
        context_group: the ranks that share them.
        continued: whether the next token is of the same document, [B, S]; None: all of a row are.
    """
    shifted: Tensor = _core_roll(x, shifts=-1, dims=-1, cp_group=context_group)[0]
    return shifted if continued is None else shifted.masked_fill(~continued, 0)


def attention_of_documents() -> type:
    """Return Transformer Engine's attention, which sees packed rows as a list of documents.

    A function, since without Transformer Engine there is no class to derive from.
    """

    class Attention(te.TEDotProductAttention):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *args: Any,
            packed_seq_params: PackedRows | None = None,
            **kwargs: Any,
        ) -> Tensor:
            """Attend: [S, B, heads, D] -> [S, B, heads * D]."""
            if packed_seq_params is None:
                return super().forward(query, key, value, *args, **kwargs)
            if self.config.context_parallel_size > 1:
                raise UserError(
                    "documents that share a row need parallel.context=1 on Transformer Engine: it "
                    "would cut every document over the context ranks, and we cut rows; set "
                    "runtime.kernels=plain or data that is not packed"
                )
            length, rows = query.shape[:2]
            out = super().forward(
                *(part.transpose(0, 1).flatten(0, 1) for part in (query, key, value)),
                *args,
                packed_seq_params=packed_seq_params.one_after_another,
                **kwargs,
            )
            return out.reshape(rows, length, -1).transpose(0, 1).contiguous()

    return Attention


_core_roll = multi_token_prediction.roll_tensor
_core_undo = mamba_context_parallel._undo_attention_load_balancing
_core_redo = mamba_context_parallel._redo_attention_load_balancing
_core_count = router.TopKRouter._apply_expert_bias
_core_tokens = router.get_tokens_per_expert_and_token_count
_core_balance_loss = router.switch_load_balancing_loss_func


def _undo_balancing(x: Tensor, size: int, _: Any = None) -> Tensor:
    return _core_undo(x, size)


def _redo_balancing(x: Tensor, size: int, _: Any = None) -> Tensor:
    return _core_redo(x, size)


def _roll(
    x: Tensor | None,
    shifts: int = -1,
    dims: int = -1,
    cp_group: Any = None,
    packed_seq_params: PackedRows | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    if x is None or packed_seq_params is None:
        return _core_roll(x, shifts, dims, cp_group)
    assert shifts == dims == -1, "MTP moves along the sequence, one token ahead"
    # Padding is where it is at every depth: it says of places, not of the tokens ahead of them.
    moved = x if x.dtype == torch.bool else shift(x, cp_group, packed_seq_params.continues)
    return moved, moved.sum()


def _count_tokens(self: Any, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
    mask = None if padding_mask is None else padding_mask.unsqueeze(-1)
    _core_count(self, routing_map, padding_mask=mask)


def _tokens_of_experts(
    routing_map: Tensor, reduce_group: Any, topk: int, with_padding_mask: bool = False
) -> tuple[Tensor, Any, Any]:
    """Return tokens of each expert over the group, and how many there are: of this rank, of all.

    Core multiplies the gradient of the balance loss with the first and divides it by the tokens of
    the whole step. That is right where all ranks have the same number; of those that share padded
    rows one has less, so each is given the mean.
    """
    counts, own, total = _core_tokens(
        routing_map=routing_map,
        reduce_group=reduce_group,
        topk=topk,
        with_padding_mask=with_padding_mask,
    )
    if with_padding_mask:
        total = total.clamp(min=1)
        own = total / reduce_group.size()
    return counts, own, total


def _balance_loss(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    topk: int,
    num_experts: int,
    **others: Any,
) -> Tensor:
    """Divide the shares of each row, [B * experts], by the tokens of that row.

    So the gradient is the same for every size of microbatch: core multiplies it with the tokens of
    the microbatch, and a row counts by its tokens.
    """
    if isinstance(total_num_tokens, Tensor):  # only beside padding
        rows = tokens_per_expert.unflatten(0, (-1, num_experts))
        tokens = (rows.sum(dim=1, keepdim=True) / topk).clamp(min=1)
        tokens_per_expert = (rows * (total_num_tokens / tokens)).flatten()
    return _core_balance_loss(
        probs=probs,
        tokens_per_expert=tokens_per_expert,
        total_num_tokens=total_num_tokens,
        topk=topk,
        num_experts=num_experts,
        **others,
    )


def _replace(place: Any, name: str, value: Any) -> None:
    assert hasattr(place, name), f"{place.__name__} has no {name} any more"
    setattr(place, name, value)
