"""Parameters, tensors, FLOPs and cache sizes of a model, from its section of the config alone.

Plain integers and no torch, so that a login node can check a job before it is submitted.

Dimensions: V rows of the embedding, L sequence length.

Layer kinds are named by their letter in the pattern (M * - E); beside them stand `embedding`,
`head`, `final_norm` and `mtp`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from hybrid_train.anatomy.axes import Sizes, sizes_of
from hybrid_train.anatomy.kinds import (
    EMBEDDING,
    HEAD,
    KINDS,
    Parameter,
    final_norm,
    mtp_block,
    parameters_of,
)
from hybrid_train.anatomy.layers import Layer, grouped, mtp_blocks
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse


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
        """Forward and backward: each GEMM needs two more, one for each of its gradients.

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
    figures. Every layer has one norm in front, which counts with it.

    Args:
        model: sizes and pattern.
        vocab_size: V, rows of the embedding as they are stored (so padded, if they are).

    Source: shapes of the published checkpoints; the totals agree with their files to the unit.
    """
    sizes = sizes_of(model, vocab_size)
    table = {"embedding": EMBEDDING.elements(sizes)}
    table["head"] = 0 if model.tie_embeddings else HEAD.elements(sizes)
    table["final_norm"] = sum(one.elements(sizes) for one in final_norm(sizes))
    active = dict(table)
    if model.tie_embeddings:  # one matrix that a token meets twice: as row and as head
        active["embedding"], active["head"] = 0, table["embedding"]
    main, block = grouped(model, depth=0), grouped(model, depth=1)
    for counted, of_layer in ((table, layer_parameters), (active, active_layer_parameters)):
        counted.update(_by_kind(main, of_layer))
        if block:
            one = sum(parameter.elements(sizes) for parameter in mtp_block(sizes))
            counted["mtp"] = mtp_blocks(model) * (one + _sum(block, of_layer))
    return ParameterCount(by_kind=table, active_by_kind=active)


def tensors(model: Model) -> TensorCount:
    """Count the tensors of the Hugging Face layout, by kind of layer.

    Source: names of the published checkpoints, `backbone.layers.L.mixer.*`; the totals agree with
    their files to the unit.
    """
    sizes = sizes_of(model)
    table = {"embedding": 1, "head": 0 if model.tie_embeddings else 1}
    table["final_norm"] = len(final_norm(sizes))
    table.update(_by_kind(grouped(model, depth=0), layer_tensors))
    if block := grouped(model, depth=1):
        table["mtp"] = mtp_blocks(model) * (len(mtp_block(sizes)) + _sum(block, layer_tensors))
    return TensorCount(by_kind=table)


def layer_tensors(layer: Layer) -> int:
    """Count the tensors of one layer, its norm included."""
    return sum(one.tensors(layer.sizes) for one in layer.parameters if one.counts)


def layer_parameters(layer: Layer) -> int:
    """Count the weights of one layer, its norm included."""
    return _elements(layer.letter, layer.sizes)[0]


def active_layer_parameters(layer: Layer) -> int:
    """Count the weights of one layer that one token meets."""
    return _elements(layer.letter, layer.sizes)[1]


def flops_per_token(model: Model, vocab_size: int, sequence_length: int) -> FlopCount:
    """Count the operations of one token in training, averaged over a sequence.

    Counted: GEMMs, convolution, attention scores and the state-space recurrence. Not
    counted: norms, activations, softmax, embedding look-up, router sorting.

    Args:
        model: sizes and pattern.
        vocab_size: V, rows of the head.
        sequence_length: L; matters to attention only.
    """
    sizes = sizes_of(model, vocab_size)

    def of_layer(layer: Layer) -> int:
        return layer_flops(layer, sequence_length)

    head = 2 * _multiplied(HEAD, sizes)
    table = _by_kind(grouped(model, depth=0), of_layer)
    table["head"] = head
    if block := grouped(model, depth=1):
        one = head + 2 * sum(_multiplied(parameter, sizes) for parameter in mtp_block(sizes))
        one += _sum(block, of_layer)
        # A repeated block saves memory, not work.
        table["mtp"] = one * parse(model.pattern).mtp_depths
    return FlopCount(by_kind=table)


def forward_flops(
    model: Model, vocab_size: int, sequence_length: int, *, heads: int, with_mtp: bool
) -> int:
    """Count the operations of one token in a forward pass of which not all is asked for.

    Args:
        model: sizes and pattern.
        vocab_size: V, rows of the head.
        sequence_length: L.
        heads: how many times the head is run: 0 for hidden states alone, 1 + D with D depths.
        with_mtp: whether the MTP blocks are run.
    """
    by_kind = flops_per_token(model, vocab_size, sequence_length).by_kind
    depths = parse(model.pattern).mtp_depths
    blocks = by_kind.get("mtp", 0) - depths * by_kind["head"]
    main = sum(flops for kind, flops in by_kind.items() if kind not in ("mtp", "head"))
    return main + with_mtp * blocks + heads * by_kind["head"]


def layer_flops(layer: Layer, sequence_length: int) -> int:
    """Count the forward operations of one layer per token, averaged over the sequence."""
    return _flops(layer.letter, layer.sizes, sequence_length)


def cache_size(model: Model, kv_bytes: int = 2, ssm_bytes: int = 4) -> CacheSize:
    """Return what generation keeps per token and per sequence, in bytes. MTP layers keep nothing.

    Args:
        model: sizes and pattern.
        kv_bytes: bytes of one element of keys, values and convolution inputs.
        ssm_bytes: bytes of one element of the state-space states.
    """
    main = grouped(model, depth=0)
    return CacheSize(
        kv_per_token=_sum(main, lambda one: one.kind.cached_per_token(one.sizes)) * kv_bytes,
        ssm_per_sequence=_sum(main, lambda one: one.kind.cached_states(one.sizes)[0]) * ssm_bytes,
        conv_per_sequence=_sum(main, lambda one: one.kind.cached_states(one.sizes)[1]) * kv_bytes,
    )


_Grouped = Iterable[tuple[Layer, int]]  # a layer, and how many there are that equal it


def _sum(layers: _Grouped, of_layer: Callable[[Layer], int]) -> int:
    return sum(number * of_layer(layer) for layer, number in layers)


def _by_kind(layers: _Grouped, of_layer: Callable[[Layer], int]) -> dict[str, int]:
    """Sum `of_layer` over the layers of each kind."""
    found: dict[str, int] = {}
    for layer, number in layers:
        found[layer.letter] = found.get(layer.letter, 0) + number * of_layer(layer)
    return found


@lru_cache(maxsize=1024)
def _flops(letter: str, sizes: Sizes, sequence_length: int) -> int:
    multiplied = _elements(letter, sizes)[2]
    return 2 * multiplied + KINDS[letter].flops_beside_weights(sizes, sequence_length)


@lru_cache(maxsize=1024)
def _elements(letter: str, sizes: Sizes) -> tuple[int, int, int]:
    """Count the weights of a layer: all, those that a token meets, those that it multiplies."""
    counted = [one for one in parameters_of(letter, sizes) if one.counts]
    return (
        sum(one.elements(sizes) for one in counted),
        sum(_met(one, sizes) for one in counted),
        sum(_multiplied(one, sizes) for one in counted),
    )


def _met(one: Parameter, sizes: Sizes) -> int:
    """Count the elements of a tensor that one token meets: of experts, top_k."""
    elements = one.elements(sizes)
    return elements // sizes.experts * sizes.top_k if one.of_experts else elements


def _multiplied(one: Parameter, sizes: Sizes) -> int:
    """Count the elements of a tensor that a token multiplies: of matrices and convolutions."""
    return _met(one, sizes) if len(one.dims) > 1 else 0
