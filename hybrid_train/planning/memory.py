"""What one process holds of a model: parameters, and the bytes of what training keeps of them.

Plain integers and no torch. Not counted: activations, and buffers such as the expert biases.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hybrid_train.anatomy.axes import Sizes, sizes_of
from hybrid_train.anatomy.gemm_formats import fp8_primary_weights
from hybrid_train.anatomy.kinds import EMBEDDING, FINAL_NORM, MTP_BLOCK, Parameter, parameters_of
from hybrid_train.anatomy.layers import Layer, block_layers, main_layers, mtp_blocks
from hybrid_train.planning.degrees import data_parallel, expert_data_parallel, expert_tensor
from hybrid_train.planning.gemm_sizes import weight_sizes
from hybrid_train.schema.model import Model
from hybrid_train.schema.optimizer import AdamW, MomentFormat
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import NumberFormat
from hybrid_train.schema.train import TrainJob

_FP32, _HALF, _FP8 = 4, 2, 1  # bytes
_MOMENT = {
    MomentFormat.float32: _FP32,
    MomentFormat.bfloat16: _HALF,
    MomentFormat.float16: _HALF,
    MomentFormat.float8: 1,
}


@dataclass(frozen=True)
class Held:
    """Parameters of one process, by the processes that hold the same ones."""

    dense: int  # repeated over data-parallel and context ranks
    expert: int = 0  # routed experts, repeated over fewer where they are split by number
    in_fp8: int = 0  # of both, those whose FP8 primary weights are kept

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.expert

    def __add__(self, other: "Held") -> "Held":
        return Held(
            self.dense + other.dense, self.expert + other.expert, self.in_fp8 + other.in_fp8
        )

    def times(self, number: int) -> "Held":
        """Return so many of them."""
        return Held(number * self.dense, number * self.expert, number * self.in_fp8)


@dataclass(frozen=True)
class Memory:
    """Bytes that one process keeps from step to step."""

    weights: int
    gradients: int
    optimizer: int  # master weights, where the weights are not float32, and both moments

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.optimizer


def held(
    model: Model,
    parallel: Parallel,
    layers: Sequence[Layer],
    vocab_rows: int,
    *,
    first: bool,
    last: bool,
) -> Held:
    """Count the parameters that one process holds of a pipeline stage.

    Args:
        model: sizes and pattern.
        parallel: degrees; the stage is split over tensor and expert ranks.
        layers: main layers of the stage.
        vocab_rows: rows of the embedding as they are stored.
        first: whether it is the first stage, with the embedding.
        last: whether it is the last stage, with final norm, head and MTP.
    """
    sizes, ways = sizes_of(model, vocab_rows), _Ways.of(parallel)
    matrix = _of_tensors((EMBEDDING,), sizes, ways)
    block = block_layers(model)
    found = matrix if first else Held(0)
    for layer in layers:
        found += _of_layer(layer.letter, layer.sizes, ways)
    if not last:
        return found
    found += _of_tensors((FINAL_NORM,), sizes, ways)
    if not (model.tie_embeddings and (first or block)):
        found += matrix
    if block:
        one = _of_tensors(MTP_BLOCK, sizes, ways)
        for layer in block:
            one += _of_layer(layer.letter, layer.sizes, ways)
        found += one.times(mtp_blocks(model))
        if not first:  # MTP embeds the tokens once more: a copy on the last stage
            found += matrix
    return found


def held_in_fp8(job: TrainJob, numbers: range) -> int:
    """Count the parameters that one process keeps in FP8 of some of the main layers, from 1."""
    layers = main_layers(job.model)
    found = 0
    for linear in fp8_primary_weights(job.model, job.precision):
        if linear.layer in numbers:
            sizes = layers[linear.layer - 1].sizes
            inner, outer = weight_sizes(job, linear.module, sizes)
            experts = sizes.experts // job.parallel.expert
            copies = experts if ".experts." in linear.module else 1
            found += copies * inner.value * outer.value
    return found


def memory(job: TrainJob, parameters: Held, processes: int) -> Memory:
    """Return the bytes that training keeps of the parameters of one process.

    The distributed optimizer splits its state over the processes that hold the same parameters
    (Rajbhandari et al., arXiv:1910.02054, stage 1). FSDP splits weights and gradients too (stage
    3); the layer that runs is whole meanwhile, and not counted. The scales of moments in 16 and 8
    bits and of weights in FP8, four bytes for a tensor or a block, are not counted either, nor are
    the copies of weights, quantized or transposed, that GEMMs are taken from.
    """
    full = job.precision.base is NumberFormat.fp32
    in_fp32 = full or job.precision.reduce_gradients_in_fp32
    state = _state_bytes(job.optimizer, masters=not full)
    dense, expert = parameters.dense, parameters.expert
    if job.parallel.distributed_optimizer:
        copies = data_parallel(job.parallel, processes) * job.parallel.context
        dense = -(-dense // copies)
        expert = -(-expert // expert_data_parallel(job.parallel, processes))
    kept = dense + expert if job.parallel.fsdp else parameters.total
    return Memory(
        weights=kept * (_FP32 if full else _HALF) - parameters.in_fp8 * (_HALF - _FP8),
        gradients=kept * (_FP32 if in_fp32 else _HALF),
        optimizer=(dense + expert) * state,
    )


def _state_bytes(adamw: AdamW, *, masters: bool) -> int:
    """Return what the optimizer keeps of one parameter.

    A float32 master is kept whole, or as the 16 bits that a bfloat16 weight lacks of it
    (`precision/formats.py`).
    """
    moments = _MOMENT[adamw.first_moment] + _MOMENT[adamw.second_moment]
    return moments + masters * (_HALF if adamw.reduced_state else _FP32)


@dataclass(frozen=True)
class _Ways:
    """How many ways tensors are split."""

    tensor: int
    expert: int  # by number of experts
    expert_tensor: int

    @classmethod
    def of(cls, parallel: Parallel) -> "_Ways":
        return cls(parallel.tensor, parallel.expert, expert_tensor(parallel))


@lru_cache(maxsize=1024)
def _of_layer(letter: str, sizes: Sizes, ways: _Ways) -> Held:
    return _of_tensors(parameters_of(letter, sizes), sizes, ways)


def _of_tensors(tensors: Iterable[Parameter], sizes: Sizes, ways: _Ways) -> Held:
    dense = expert = 0
    for one in tensors:
        if one.buffer:
            continue
        if one.of_experts:
            expert += one.elements(sizes) // (ways.expert * ways.expert_tensor)
        else:
            dense += one.elements(sizes) // (1 if one.split is None else ways.tensor)
    return Held(dense, expert)
