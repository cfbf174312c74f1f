"""One depth of multi-token prediction: core's layer, for rows that hold several documents."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor

from hybrid_train.megatron.packed_rows import PackedRows


class MtpLayer(MultiTokenPredictionLayer):
    """Core's layer, which looks one token ahead within documents only.

    Core (0.19.2) cuts each document over the context ranks, by a kernel of Transformer Engine
    (multi_token_prediction.py 238); and it moves the padding mask with the tokens (1104), though
    padding is where it is at every depth: it says of places, not of the tokens ahead of them.
    """

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        embedding: Callable[..., Tensor],
        hidden_states: Tensor,
        packed_seq_params: PackedRows | None = None,
        padding_mask: Tensor | None = None,
    ) -> Any:
        """Return tokens and positions one ahead, [B, S], the padding, embeddings, hidden states."""
        if packed_seq_params is None:
            return super()._get_embeddings(
                input_ids, position_ids, embedding, hidden_states, padding_mask=padding_mask
            )
        continues = packed_seq_params.continues
        assert continues is not None, "packed rows say where documents go on"

        def within(x: Tensor) -> Tensor:
            return x.masked_fill(~continues, 0)

        def embed(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return embedding(input_ids=within(input_ids), position_ids=within(position_ids))

        tokens, positions, _, embedded, hidden = super()._get_embeddings(
            input_ids, position_ids, embed, hidden_states
        )
        return within(tokens), within(positions), padding_mask, embedded, hidden
