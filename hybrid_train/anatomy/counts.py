"""Parameters, tensors, FLOPs and cache sizes of a model, from its section of the config alone.

Plain integers and no torch, so that a login node can check a job before it is submitted.

Dimensions: h hidden, V rows of the embedding, D Mamba heads x head width, G groups, N state,
H Mamba heads, P head width, K convolution width, L sequence length.

Layer kinds are named by their letter in the pattern (M * - E); beside them stand `embedding`,
`head`, `final_norm` and `mtp`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse

CONV_WIDTH = 4  # K: taps of the causal convolution in a Mamba layer; the same in the whole family


@dataclass(frozen=True)
class ParameterCount:
    """Weights of a model. Expert biases count, as in published checkpoints."""

    by_kind: Mapping[str, int]
    active_by_kind: Mapping[str, int]  # what one token meets: top_k of the routed experts

    @property
    def total(self) -> int:
        """All weights."""
        return sum(self.by_kind.values())

    @property
    def active(self) -> int:
        """Weights that one token meets, embedding and head included."""
        return sum(self.active_by_kind.values())

    @property
    def active_without_embedding(self) -> int:
        """Active weights without the input embedding; the figure that model cards publish."""
        return self.active - self.active_by_kind["embedding"]


@dataclass(frozen=True)
class TensorCount:
    """Tensors of a model in the Hugging Face layout: one for each expert and projection."""

    by_kind: Mapping[str, int]

    @property
    def total(self) -> int:
        """All tensors."""
        return sum(self.by_kind.values())


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations per token; a multiply-add counts as two."""

    by_kind: Mapping[str, int]  # forward pass; `mtp` includes its layers and its runs of the head

    @property
    def forward(self) -> int:
        """One forward pass, MTP included."""
        return sum(self.by_kind.values())

    @property
    def training(self) -> int:
        """Forward and backward: each product needs two more, one for each of its gradients.

        Recomputed activations do not count (Chowdhery et al., arXiv:2204.02311, appendix B).
        """
        return 3 * self.forward

    def training_of(self, kind: str) -> int:
        """The share of one kind in `training`."""
        return 3 * self.by_kind[kind]


@dataclass(frozen=True)
class CacheSize:
    """Memory that generation keeps, in bytes."""

    kv_per_token: int  # keys and values of all attention layers
    ssm_per_sequence: int  # states of all Mamba layers; the same at every length
    conv_per_sequence: int  # last inputs of the convolutions

    def of_sequence(self, length: int) -> int:
        """Bytes for one sequence of `length` tokens."""
        return self.kv_per_token * length + self.ssm_per_sequence + self.conv_per_sequence


def parameters(model: Model, vocab_size: int) -> ParameterCount:
    """Count the weights, by kind of layer.

    A repeated MTP block is stored once and met once per depth; as weights it counts once in both
    figures. Every layer has one RMSNorm of h weights in front, which counts with it.

    Args:
        model: sizes and pattern.
        vocab_size: V, rows of the embedding as they are stored (so padded, if they are).

    Source: shapes of the published checkpoints; the totals agree with their files to the unit.
    """
    pattern = parse(model.pattern)
    table = {"embedding": vocab_size * model.hidden_size}
    table["head"] = 0 if model.tie_embeddings else table["embedding"]
    table["final_norm"] = model.hidden_size
    active = dict(table)
    if model.tie_embeddings:  # one matrix that a token meets twice: as row and as head
        active["embedding"], active["head"] = 0, table["embedding"]
    for counted, of_layer in ((table, layer_parameters), (active, active_layer_parameters)):
        counted.update(_by_kind(model, pattern.main, of_layer))
        if pattern.mtp:
            # eh_proj joins embedding and hidden state: h x 2h; three norms of its own.
            block = 2 * model.hidden_size**2 + 3 * model.hidden_size
            block += sum(of_layer(model, letter) for letter in pattern.mtp)
            counted["mtp"] = block * (1 if model.mtp.repeated_block else pattern.mtp_depths)
    return ParameterCount(by_kind=table, active_by_kind=active)


def tensors(model: Model) -> TensorCount:
    """Count the tensors of the Hugging Face layout, by kind of layer.

    Source: names of the published checkpoints, `backbone.layers.L.mixer.*`; the totals agree with
    their files to the unit.
    """
    pattern = parse(model.pattern)
    table = {"embedding": 1, "head": 0 if model.tie_embeddings else 1, "final_norm": 1}
    table.update(_by_kind(model, pattern.main, layer_tensors))
    if pattern.mtp:
        block = 4 + sum(layer_tensors(model, letter) for letter in pattern.mtp)  # eh_proj, 3 norms
        table["mtp"] = block * (1 if model.mtp.repeated_block else pattern.mtp_depths)
    return TensorCount(by_kind=table)


def layer_tensors(model: Model, letter: str) -> int:
    """Count the tensors of one layer, its norm included."""
    if letter != "E":
        # M: in_proj, out_proj, convolution and its bias, A_log, D, dt_bias, gated norm;
        # *: queries, keys, values, output; -: up, down.
        return 1 + {"M": 8, "*": 4, "-": 2}[letter]
    moe = model.moe
    pairs = moe.experts + (moe.shared_intermediate_size is not None) + (moe.latent_size is not None)
    bias = moe.bias_update_rate > 0
    return 1 + 1 + bias + 2 * pairs  # norm, router, its bias; up and down, or in and out


def layer_parameters(model: Model, letter: str) -> int:
    """Count the weights of one layer of the kind `letter`, its norm included."""
    return model.hidden_size + _PARAMETERS[letter](model)


def active_layer_parameters(model: Model, letter: str) -> int:
    """Count the weights of one layer that one token meets."""
    asleep = 0
    if letter == "E":
        asleep = (model.moe.experts - model.moe.top_k) * _expert(model)
    return layer_parameters(model, letter) - asleep


def flops_per_token(model: Model, vocab_size: int, sequence_length: int) -> FlopCount:
    """Count the operations of one token in training, averaged over a sequence.

    Counted: matrix products, convolution, attention scores and the state-space recurrence. Not
    counted: norms, activations, softmax, embedding look-up, router sorting.

    Args:
        model: sizes and pattern.
        vocab_size: V, rows of the head.
        sequence_length: L; matters to attention only.
    """
    pattern = parse(model.pattern)

    def of_layer(model: Model, letter: str) -> int:
        return layer_flops(model, letter, sequence_length)

    head = 2 * model.hidden_size * vocab_size
    table = _by_kind(model, pattern.main, of_layer)
    table["head"] = head
    if pattern.mtp:
        block = 2 * 2 * model.hidden_size**2 + head
        block += sum(of_layer(model, letter) for letter in pattern.mtp)
        table["mtp"] = block * pattern.mtp_depths  # a repeated block saves memory, not work
    return FlopCount(by_kind=table)


def layer_flops(model: Model, letter: str, sequence_length: int) -> int:
    """Count the forward operations of one layer per token, averaged over the sequence."""
    return _FLOPS[letter](model, sequence_length)


def cache_size(model: Model, kv_bytes: int = 2, ssm_bytes: int = 4) -> CacheSize:
    """Return what generation keeps per token and per sequence, in bytes. MTP layers keep nothing.

    Args:
        model: sizes and pattern.
        kv_bytes: bytes of one element of keys, values and convolution inputs.
        ssm_bytes: bytes of one element of the state-space states.
    """
    main = Counter(parse(model.pattern).main)
    attention, mamba = model.attention, model.mamba
    return CacheSize(
        kv_per_token=main["*"] * 2 * attention.kv_heads * attention.head_dim * kv_bytes,
        ssm_per_sequence=main["M"] * mamba.heads * mamba.head_dim * mamba.state_size * ssm_bytes,
        conv_per_sequence=main["M"] * CONV_WIDTH * _conv_channels(model) * kv_bytes,
    )


def _by_kind(model: Model, letters: str, of_layer: Callable[[Model, str], int]) -> dict[str, int]:
    """Sum `of_layer` over the layers of each kind."""
    return {letter: number * of_layer(model, letter) for letter, number in Counter(letters).items()}


def _conv_channels(model: Model) -> int:
    """Channels that pass the convolution: x, B and C; D + 2GN."""
    mamba = model.mamba
    return mamba.heads * mamba.head_dim + 2 * mamba.groups * mamba.state_size


def _mamba_projections(model: Model) -> int:
    """Weights of in_proj (z, x, B, C, dt: 2D + 2GN + H rows) and of out_proj (D columns)."""
    inner = model.mamba.heads * model.mamba.head_dim
    return model.hidden_size * (inner + _conv_channels(model) + model.mamba.heads + inner)


def _mamba_parameters(model: Model) -> int:
    """Projections, convolution with bias, A_log, D and dt_bias per head, gated norm."""
    convolution = (CONV_WIDTH + 1) * _conv_channels(model)
    inner = model.mamba.heads * model.mamba.head_dim
    return _mamba_projections(model) + convolution + 3 * model.mamba.heads + inner


def _mamba_flops(model: Model, sequence_length: int) -> int:
    """Projections, convolution and recurrence.

    The recurrence costs two products of N x P per head and token: dt B x^T into the state and C
    out of it, 4 H N P in all. A chunked scan of length Q does about Q (G N + H P) more; that is
    the price of an algorithm, which changes with Q while the result does not, so it is not
    counted as work of the model.

    Figures published for this family come from Megatron-LM's counter, which takes D = 2h and
    7 D N for the scan. They agree with ours within 1% where D = 2h, and are 8% higher for
    Nano 3 30B, where D = 1.5h.
    """
    del sequence_length  # linear in it
    mamba = model.mamba
    recurrence = 4 * mamba.heads * mamba.head_dim * mamba.state_size
    return 2 * (_mamba_projections(model) + CONV_WIDTH * _conv_channels(model)) + recurrence


def _attention_parameters(model: Model) -> int:
    """Queries and output: h x heads each; keys and values: h x kv_heads each; times head width."""
    sizes = model.attention
    return model.hidden_size * sizes.head_dim * 2 * (sizes.heads + sizes.kv_heads)


def _attention_flops(model: Model, sequence_length: int) -> int:
    """Projections, and two products per key seen: with the query, and with the value.

    A causal token t sees t keys, (L + 1) / 2 on average: 2 * 2 * heads * head_dim * (L + 1) / 2.
    """
    width = model.attention.heads * model.attention.head_dim
    return 2 * _attention_parameters(model) + 2 * width * (sequence_length + 1)


def _mlp_parameters(model: Model) -> int:
    """Up and down projection, no gate."""
    return 2 * model.hidden_size * model.mlp.intermediate_size


def _mlp_flops(model: Model, sequence_length: int) -> int:
    """Up and down projection."""
    del sequence_length  # linear in it
    return 2 * _mlp_parameters(model)


def _expert(model: Model) -> int:
    """Weights of one routed expert; LatentMoE experts work in the latent width."""
    moe = model.moe
    return 2 * (moe.latent_size or model.hidden_size) * moe.intermediate_size


def _moe_dense(model: Model) -> int:
    """Weights that every token meets: router, shared expert, both latent projections."""
    moe = model.moe
    per_channel = moe.experts + 2 * (moe.shared_intermediate_size or 0) + 2 * (moe.latent_size or 0)
    return model.hidden_size * per_channel


def _moe_parameters(model: Model) -> int:
    """Dense part, all experts, and one bias per expert where there is one."""
    bias = model.moe.experts if model.moe.bias_update_rate > 0 else 0
    return _moe_dense(model) + model.moe.experts * _expert(model) + bias


def _moe_flops(model: Model, sequence_length: int) -> int:
    """Dense part, and top_k experts."""
    del sequence_length  # linear in it
    return 2 * (_moe_dense(model) + model.moe.top_k * _expert(model))


_PARAMETERS: dict[str, Callable[[Model], int]] = {
    "M": _mamba_parameters,
    "*": _attention_parameters,
    "-": _mlp_parameters,
    "E": _moe_parameters,
}
_FLOPS: dict[str, Callable[[Model, int], int]] = {
    "M": _mamba_flops,
    "*": _attention_flops,
    "-": _mlp_flops,
    "E": _moe_flops,
}
