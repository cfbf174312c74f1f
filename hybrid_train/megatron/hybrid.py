"""The hybrid language model: Megatron-Core's, which leaves every loss to its reader.

Dimensions: S sequence, B batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from hybrid_train.anatomy.kinds import possible_parameters
from hybrid_train.megatron import packed_rows
from hybrid_train.megatron.outputs import Head, OutputLayer, Outputs
from hybrid_train.megatron.router import routers

# Parameters and buffers that stay in float32 in a bfloat16 model, by the ends of their names; the
# last is core's own count, which no checkpoint holds.
FLOAT32 = (
    *(one.name.rpartition(".")[2] for one in possible_parameters() if one.float32),
    "local_tokens_per_expert",
)


class Hybrid(HybridModel):
    """Megatron's HybridModel that leaves all losses, MTP's too, to its reader.

    Core adds each MTP loss to the gradient inside the forward pass, divided by the token count of
    this rank and microbatch alone (Megatron-LM#7452, finding 3, core 0.19.2). Here every depth gets
    the denominator of the whole step from the objective.
    """

    def __init__(self, *, num_tokens: int, **settings: Any) -> None:
        """Build the chunk.

        Args:
            num_tokens: of the vocabulary without its padding, which has no probability.
            **settings: core's; its vocab_size counts the padded rows.
        """
        super().__init__(**settings)
        for router in routers([self.mtp] if self.mtp_process else []):
            # Core's stack does not tell them (hybrid_block.py 191): the balance loss of a block
            # that serves several depths would count once for each.
            router.is_mtp_layer = True
        if self.post_process or self.mtp_process:
            # Core names the class of the layer itself (hybrid_model.py 349).
            self.output_layer.__class__ = OutputLayer
            self.output_layer.num_tokens = num_tokens
        if self.share_embeddings_and_output_weights and self.mtp_process:
            # Behind the first pipeline stage core 0.19.2 allocates a head that nothing reads and
            # that its own checkpoints refuse (hybrid_model.py 322, language_module.py 497).
            self.output_layer.weight = None
            # What head and embedding add to one weight meets in its ordinary gradient; without the
            # mark, which core sets on a single stage only, that of the embedding is lost.
            self.embedding.word_embeddings.weight.zero_out_wgrad = True
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name.rpartition(".")[2] in FLOAT32:  # core makes dt_bias as the rest of the model
                tensor.data = tensor.data.float()  # (mamba_mixer.py 368)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_context: Any = None,
        *,
        sequence_index: Tensor | None = None,
        padding: Tensor | None = None,
        read: Callable[[Outputs], Any] | None = None,
    ) -> Any:
        """Run the chunk of the model that this pipeline stage holds.

        Args:
            input_ids: tokens, [B, S].
            position_ids: positions, [B, S]; only MTP looks at them, and is not run without.
            inference_context: cache of a running generation.
            sequence_index: number of the document of each token of the whole rows, [B, L], where
                several share one and must not see each other; None where a row is one sequence.
            padding: tokens that routers do not count, [B, S], bool.
            read: what to make of the outputs before the pass is over, as a loss: gathered weights
                are there no longer than that, and gradients begin at what the pass returns.

        Returns:
            Before the last stage hidden states, [S, B, hidden]; on the last one `Outputs`, or what
            `read` makes of them.
        """
        hidden = self.embedding(input_ids, position_ids) if self.pre_process else None
        if hidden is not None and torch.is_grad_enabled() and self.config.recompute_granularity:
            # Layers that are computed again get no gradient where their input has none, as that of
            # a frozen embedding (core 0.19.2, tensor_parallel/random.py, CheckpointFunction).
            hidden.requires_grad_()
        packing: dict[str, Any] = {}
        if sequence_index is not None:
            packing = packed_rows.arguments(
                sequence_index, padding, self.pg_collection, self.config
            )
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            inference_context=inference_context,
            **packing,
        )
        if not self.post_process:
            return hidden
        depths: tuple[Tensor, ...] = ()
        if self.mtp_process and position_ids is not None:
            states = self.mtp(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden,
                attention_mask=None,
                embedding=self.embedding,
                **packing,
            )
            hidden, *depths = states.chunk(1 + self.mtp_num_depths, dim=0)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        outputs = Outputs(hidden, tuple(depths), Head(self.output_layer, weight))
        return outputs if read is None else read(outputs)
