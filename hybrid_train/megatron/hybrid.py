"""Our hybrid model and its MTP layer, and what a pass of it ends in.

Dimensions: S sequence, B batch, V vocabulary with its padding, H hidden.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import get_model_config
from torch import Tensor

from hybrid_train.anatomy.kinds import possible_parameters
from hybrid_train.megatron import mamba
from hybrid_train.megatron.mamba import PackedRows
from hybrid_train.megatron.plain import ColumnParallelLinear
from hybrid_train.megatron.router import routers
from hybrid_train.ops.context import own_chunks
from hybrid_train.ops.logits import HeadPart, Reading, Term, read, weighted_sum
from hybrid_train.ops.rope import angles, frequencies
from hybrid_train.schema.model import Rope

# Parameters and buffers that stay in float32 in a bfloat16 model, by the ends of their names; the
# last is core's own count, which no checkpoint holds.
FLOAT32 = (
    *(one.name.rpartition(".")[2] for one in possible_parameters() if one.float32),
    "local_tokens_per_expert",
)


class OutputLayer(ColumnParallelLinear):
    """Core's output layer, which can also compute a loss of its logits.

    The loss is computed within `forward`, since what gathers a weight for the time of its use does
    so around the module that has it.
    """

    num_tokens: int  # of the vocabulary without its padding

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        term: Term | None = None,
        weights: Tensor | None = None,
        reading: Reading | None = None,
        places: Tensor | None = None,
    ) -> Any:
        """Return logits [S, B, V / tp] and no bias.

        With a term, its sum and values; with a reading, the values at these places.
        """
        if reading is not None:
            assert places is not None, "a reading needs places"
            return read(input_, self.part(weight), reading, places)
        if term is None:
            return super().forward(input_, weight, runtime_gather_output)
        assert weights is not None, "a term needs weights"
        return weighted_sum(input_, self.part(weight), term, weights)

    def part(self, tied_weight: Any) -> HeadPart:
        """Return this rank's rows, or those of the embedding that the head shares."""
        weight = self.weight if tied_weight is None else tied_weight
        group = self.tp_group if self.tp_group.size() > 1 else None
        buffer = getattr(weight, "main_grad", None) if self.gradient_accumulation_fusion else None
        if group is None and getattr(weight, "zero_out_wgrad", False):
            # The embedding adds to this weight, too: their gradients meet in an ordinary one.
            buffer = None
        if buffer is not None and torch.is_grad_enabled():
            weight.grad_added_to_main_grad = True
        return HeadPart(weight, self.num_tokens, group, self.sequence_parallel, buffer)


@dataclass(frozen=True)
class Head:
    """The output layer with the weight that it has or, where embeddings are tied, is given."""

    layer: OutputLayer
    tied_weight: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [S / tp or S, B, H] to logits over the padded vocabulary, [B, S, V]."""
        logits, _ = self.layer(hidden, weight=self.tied_weight)
        return gather_from_tensor_model_parallel_region(
            logits.transpose(0, 1), group=self.layer.tp_group
        )

    @property
    def part(self) -> HeadPart:
        """This rank's rows; with FSDP they are there in the forward pass alone."""
        return self.layer.part(self.tied_weight)

    def weighted_sum(self, hidden: Tensor, term: Term, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sum up a term of the logits, which are never there all at once; see `ops.logits`.

        Args:
            hidden: as the layout holds it, [S / tp or S, B, H].
            term: of the S x B tokens, sequence before batch.
            weights: of each token, [B, S].

        Returns:
            The sum, with gradients; the values [B, S] or [B, S, K], without.
        """
        by_row = weights.transpose(0, 1)
        total, values = self.layer(hidden, self.tied_weight, term=term, weights=by_row)
        return total, values.view(*by_row.shape, *values.shape[1:]).transpose(0, 1)

    def read(self, hidden: Tensor, reading: Reading, places: Tensor) -> Tensor:
        """Return what a reading makes of the logits of some tokens, without gradients, [n, K].

        Args:
            hidden: as the layout holds it, [S / tp or S, B, H].
            reading: of n of the S x B tokens.
            places: their numbers, sequence before batch, [n].
        """
        values: Tensor = self.layer(hidden, self.tied_weight, reading=reading, places=places)
        return values


@dataclass(frozen=True)
class Outputs:
    """What the last pipeline stage makes of a microbatch.

    Attributes:
        hidden: after the final norm, as the layout holds it, [S / tp or S, B, H].
        mtp_hidden: of each MTP depth in the same shape; empty where they were not run.
        head: maps each of them to logits.
    """

    hidden: Tensor
    mtp_hidden: tuple[Tensor, ...]
    head: Head

    def logits(self) -> Tensor:
        """Return the logits of the next token over the padded vocabulary, [B, S, V]."""
        return self.head.logits(self.hidden)


class Hybrid(HybridModel):
    """Megatron's HybridModel that leaves all losses, MTP's too, to its reader.

    Core adds each MTP loss to the gradient inside the forward pass, divided by the token count of
    this rank and microbatch alone (Megatron-LM#7452, finding 3, core 0.19.2). Here every depth gets
    the denominator of the whole step from the objective.

    Attributes:
        rope: how queries and keys are turned; None: they are not.
        channels: of embeddings that are not masked, [H] of 0 and 1; None: all; set by edits.
        runs_mtp: whether MTP blocks are run where they are there; set by edits.
    """

    channels: Tensor | None = None
    runs_mtp: bool = True

    def __init__(self, *, num_tokens: int, rope: Rope | None = None, **settings: Any) -> None:
        """Build the chunk.

        Args:
            num_tokens: of the vocabulary without its padding, which has no probability.
            rope: position embedding; without a theta there is none.
            **settings: core's; its vocab_size counts the padded rows.
        """
        super().__init__(**settings)
        self.num_tokens = num_tokens
        self.rope = rope if rope is not None and rope.theta is not None else None
        self._angles: dict[int, Tensor] = {}  # by the length of a row on this rank
        if self.rope is not None:
            for module in self.modules():
                if isinstance(module, SelfAttention):  # by which core multiplies cosine and sine
                    module._yarn_concentration_factor = self.rope.magnitude
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
        *,
        sequence_index: Tensor | None = None,
        padding: Tensor | None = None,
        read: Callable[[Outputs], Any] | None = None,
    ) -> Any:
        """Run the chunk of the model that this pipeline stage holds.

        Args:
            input_ids: tokens, [B, S].
            position_ids: positions, [B, S]; only MTP looks at them, and is not run without.
            sequence_index: number of the document of each token of the whole rows, [B, L], where
                several share one and must not see each other; None where a row is one sequence.
            padding: tokens that routers do not count, [B, S], bool.
            read: what to make of the outputs before the pass is over, as a loss: gathered weights
                are there no longer than that, and gradients begin at what the pass returns.

        Returns:
            Before the last stage hidden states, [S, B, hidden]; on the last one `Outputs`, or what
            `read` makes of them.
        """
        if self.config.fine_grained_activation_offloading and torch.is_grad_enabled():
            self.preprocess_for_fine_grained_offloading()  # as core's forward does (439)
        hidden = self.embed(input_ids, position_ids) if self.pre_process else None
        if hidden is not None and torch.is_grad_enabled() and self.config.recompute_granularity:
            # Layers that are computed again get no gradient where their input has none, as that of
            # a frozen embedding (core 0.19.2, tensor_parallel/random.py, CheckpointFunction).
            hidden.requires_grad_()
        told: dict[str, Any] = {"rotary_pos_emb": self.angles(input_ids)}
        if sequence_index is not None:
            told |= mamba.packed_arguments(sequence_index, padding, self.pg_collection, self.config)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            **told,
        )
        if not self.post_process:
            return hidden
        depths: tuple[Tensor, ...] = ()
        if self.mtp_process and self.runs_mtp and position_ids is not None:
            states = self.mtp(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden,
                attention_mask=None,
                embedding=self.embed,
                **told,
            )
            hidden, *depths = states.chunk(1 + self.mtp_num_depths, dim=0)
        outputs = Outputs(hidden, tuple(depths), self.head())
        return outputs if read is None else read(outputs)

    def angles(self, input_ids: Tensor) -> Tensor | None:
        """Return the angles of the positions of this context rank, as core takes them.

        Positions run on over the documents of a row: only distances matter, and a document sees
        itself alone.

        Args:
            input_ids: of this rank, [B, S].

        Returns:
            [S, 1, 1, turned channels]; None without position embedding.
        """
        if self.rope is None:
            return None
        length = input_ids.shape[1]
        if length not in self._angles:  # of a run there are few
            ranks = self.pg_collection.cp
            turning = frequencies(self.rope, self.config.kv_channels, length * ranks.size())
            own = own_chunks(torch.arange(length * ranks.size()), ranks.rank(), ranks.size(), dim=0)
            found = angles(turning, own)[:, None, None]
            self._angles[length] = found.to(input_ids.device)
        return self._angles[length]

    def embed(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return embeddings of tokens [B, S], as the layout holds them, [S / tp or S, B, H]."""
        embedded: Tensor = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return embedded if self.channels is None else embedded * self.channels

    def head(self) -> Head:
        """Return the head of the last pipeline stage."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return Head(self.output_layer, weight)


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


def skip(layer: torch.nn.Module, *, skipped: bool = True) -> None:
    """Let a layer of a stack hand on what it is given, or compute as it was built."""
    if skipped:
        layer.forward = partial(_hand_on, layer)
    else:
        vars(layer).pop("forward", None)


def is_skipped(layer: torch.nn.Module) -> bool:
    """Tell whether a layer hands on what it is given."""
    return "forward" in vars(layer)


def _hand_on(layer: torch.nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    """Return hidden states and no context, as core's stack takes it from layers of all kinds."""
    if torch.is_grad_enabled():
        weights = [weight for weight in layer.parameters() if weight.requires_grad]
        handed: Tensor = _HandedOn.apply(hidden_states, *weights)
        return handed, None
    return hidden_states, None


class _HandedOn(torch.autograd.Function):
    """Gives weights that took no part a gradient of zeros.

    Data parallelism that reduces gradients while others are computed waits for each of them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = weights
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.weights)


def limit_vocabulary(chunks: Sequence[Any], num_tokens: int) -> None:
    """Let the rows of a vocabulary behind a number of tokens be padding, without probability."""
    for chunk in chunks:
        chunk.num_tokens = min(chunk.num_tokens, num_tokens)
        if chunk.post_process or chunk.mtp_process:
            chunk.output_layer.num_tokens = chunk.num_tokens


def mtp_blocks(chunks: Sequence[Any]) -> tuple[int, bool]:
    """Return how many MTP depths a model has, and whether one block of weights serves them all."""
    config = get_model_config(chunks[0])
    return config.mtp_num_layers or 0, bool(config.mtp_use_repeated_layer)


@contextlib.contextmanager
def whole_sequences(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let every tensor-parallel rank see all tokens: a single one cannot be split among them.

    Core's switch for this (0.19.2, transformer/utils.py 352) misses configs that layers have of
    their own, switches on again what was never on, and knows a model by an id that a later one may
    have. Marks of weights stay as they are: they say how gradients are summed.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    holders = [*modules, *(one.config for one in modules if hasattr(one, "config"))]
    split = [
        (holder, name)
        for holder in {id(holder): holder for holder in holders}.values()
        for name in ("sequence_parallel", "reduce_scatter_embeddings")
        if getattr(holder, name, False) is True
    ]
    for holder, name in split:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name in split:
            setattr(holder, name, True)
