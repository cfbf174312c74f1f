"""The hybrid language model: Megatron-Core's, with losses of every prediction depth as output.

Dimensions: S sequence, B batch, V vocabulary, D prediction depths of MTP.
"""

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from hybrid_train.model import packed
from hybrid_train.ops.vocab_parallel import cross_entropy


class Hybrid(HybridModel):
    """Megatron's HybridModel whose MTP losses are returned instead of added behind the scenes.

    Core adds each MTP loss to the gradient inside the forward pass, divided by the token count of
    this rank and microbatch alone (Megatron-LM#7452, finding 3, core 0.19.2). Returned as rows of
    the output, every depth gets the denominator of the whole step from the objective.
    """

    def __init__(self, *, num_tokens: int, **settings: Any) -> None:
        """Build the chunk.

        Args:
            num_tokens: of the vocabulary without its padding, which has no probability.
            **settings: core's; its vocab_size counts the padded rows.
        """
        super().__init__(**settings)
        self.num_tokens = num_tokens
        if self.share_embeddings_and_output_weights and self.mtp_process:
            # Behind the first pipeline stage core 0.19.2 allocates a head that nothing reads and
            # that its own checkpoints refuse (hybrid_model.py 322, language_module.py 497).
            self.output_layer.weight = None
            # What head and embedding add to one weight meets in its ordinary gradient; without the
            # mark, which core sets on a single stage only, that of the embedding is lost.
            self.embedding.word_embeddings.weight.zero_out_wgrad = True

    def forward(  # noqa: PLR0913 - core's arguments, and where documents end
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_context: Any = None,
        *,
        sequence_index: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Run the chunk of the model that this pipeline stage holds.

        Args:
            input_ids: tokens, [B, S].
            position_ids: positions, [B, S]; only MTP looks at them.
            attention_mask: unused, attention is causal.
            decoder_input: unused, tokens are embedded here.
            labels: next token of each token, [B, S]; None for logits.
            inference_context: cache of a running generation.
            sequence_index: number of the document of each token of the whole rows, [B, L], where
                several share one and must not see each other; None where a row is one sequence.
            padding: tokens that routers do not count, [B, S], bool.

        Returns:
            Before the last stage hidden states, [S, B, hidden]; on the last one, with labels, the
            cross-entropy of the next token and of each MTP depth, [1 + D, B, S] in float32, else
            logits over the padded vocabulary, [B, S, V]; with a cache those of the last position.
        """
        hidden = self.embedding(input_ids, position_ids) if self.pre_process else None
        packing: dict[str, Any] = {}
        if sequence_index is not None:
            packing = packed.arguments(sequence_index, padding, self.pg_collection, self.config)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            inference_context=inference_context,
            **packing,
        )
        if not self.post_process:
            return hidden
        if labels is None:
            if inference_context is not None:
                hidden = hidden[-1:]  # decoding looks at the last position alone
            logits = self._logits(hidden)
            return gather_from_tensor_model_parallel_region(
                logits.transpose(0, 1), group=self.pg_collection.tp
            )
        if not self.mtp_process:
            return self._losses(hidden, labels).unsqueeze(0)
        return self._losses_of_all_depths(hidden, input_ids, position_ids, labels, packing)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states to this rank's part of the vocabulary, [S, B, V / tp]."""
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        logits, _ = self.output_layer(hidden, weight=weight)
        return logits

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self._logits(hidden)
        losses = cross_entropy(
            logits, labels.transpose(0, 1), self.pg_collection.tp, vocab_size=self.num_tokens
        )
        return losses.transpose(0, 1)

    def _losses_of_all_depths(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        position_ids: Tensor | None,
        labels: Tensor,
        packing: dict[str, Any],
    ) -> Tensor:
        states = self.mtp(
            input_ids=input_ids,
            position_ids=position_ids,
            hidden_states=hidden,
            attention_mask=None,
            embedding=self.embedding,
            **packing,
        )
        continued = packing["packed_seq_params"].continues if packing else None
        losses = []
        for depth_hidden in states.chunk(1 + self.mtp_num_depths, dim=0):
            losses.append(self._losses(depth_hidden, labels))
            labels = packed.shift(labels, self.pg_collection.cp, continued)
        return torch.stack(losses)
