"""Our Mamba mixer, and how it and attention run on rows of several documents.

The boundaries of documents travel as core's `packed_seq_params`, through every pipeline stage and
recomputed layer, but rows stay rows: [S, B, H], cut for context parallelism wherever documents end.
Core (0.19.2) wants a single row in which every document is cut and padded for itself instead; what
reads it so is overridden in our classes: mixer and attention here, the MTP layer in `hybrid.py`,
the router in `router.py`, plain attention in `plain.py`.

Dimensions: B rows, L tokens of a row, S of them on this context-parallel rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.ssm.mamba_mixer import MambaMixer as CoreMixer
from megatron.core.transformer.multi_token_prediction import roll_tensor
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


def packed_arguments(
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


def shift(x: Tensor, context_group: Any, continued: Tensor | None) -> Tensor:
    """Move [B, S] one token ahead, as MTP does from depth to depth; zeros behind the end.

    Args:
        x: this context-parallel rank's part of the rows.
        context_group: the ranks that share them.
        continued: whether the next token is of the same document, [B, S]; None: all of a row are.
    """
    shifted: Tensor = roll_tensor(x, shifts=-1, dims=-1, cp_group=context_group)[0]
    return shifted if continued is None else shifted.masked_fill(~continued, 0)


class MambaMixer(CoreMixer):
    """Core's mixer, but for two of its faults (core 0.19.2)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # Core gives the gated norm 1e-5 whatever the config says (mamba_mixer.py 419).
        self.norm.eps = config.layernorm_epsilon
        self.cp.__class__ = _WholeRows  # whose class core names itself


class _WholeRows(MambaContextParallel):
    """Cuts rows over context ranks wherever their documents end.

    Core cuts every document for itself, by a kernel of Transformer Engine
    (mamba_context_parallel.py 380).
    """

    def pre_conv_ssm(self, input_: Tensor, packed_seq_params: PackedRows | None = None) -> Tensor:
        return super().pre_conv_ssm(input_)

    def post_conv_ssm(self, input_: Tensor, packed_seq_params: PackedRows | None = None) -> Tensor:
        return super().post_conv_ssm(input_)


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
