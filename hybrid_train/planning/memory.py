"""What one process holds of a model: parameters, and the bytes of what training keeps of them.

Plain integers and no torch. Not counted: activations, and buffers such as the expert biases.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hybrid_train.anatomy.axes import Sizes, sizes_of
from hybrid_train.anatomy.gemm_formats import fp8_primary_weights
from hybrid_train.anatomy.kinds import EMBEDDING, Parameter, final_norm, mtp_block, parameters_of
from hybrid_train.anatomy.layers import Layer, block_layers, main_layers, mtp_blocks
from hybrid_train.planning.degrees import data_parallel, expert_data_parallel, expert_tensor
from hybrid_train.planning.gemm_sizes import weight_sizes
from hybrid_train.schema.model import Model
from hybrid_train.schema.optimizer import AdamW, MomentFormat
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import NumberFormat
from hybrid_train.schema.train import TrainJob

_FP32, _HALF, _FP8 = 4, 2, 1  # bytes
_HOSTED = 4 * _FP32  # of an offloaded parameter: its copy, gradient and moments
_MATRIX, _NORM, _BLOCK = "embedding or head", "final norm", "MTP block"
_OUTER: dict[str, Callable[[Sizes], tuple[Parameter, ...]]] = {  # in no layer
    _MATRIX: lambda _: (EMBEDDING,),
    _NORM: final_norm,
    _BLOCK: mtp_block,
}
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
    in_fp32: int = 0  # of the dense ones, those that stay in float32 in a model of another format

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.expert

    def __add__(self, other: "Held") -> "Held":
        return Held(
            self.dense + other.dense,
            self.expert + other.expert,
            self.in_fp8 + other.in_fp8,
            self.in_fp32 + other.in_fp32,
        )

    def times(self, number: int) -> "Held":
        """Return so many of them."""
        own = (self.dense, self.expert, self.in_fp8, self.in_fp32)
        return Held(*(number * one for one in own))


@dataclass(frozen=True)
class Memory:
    """Bytes that one process keeps from step to step."""

    weights: int
    gradients: int
    optimizer: int  # master weights, where the weights are not float32, and both moments
    host: int = 0  # in host memory, for the share of the optimizer that is offloaded

    @property
    def total(self) -> int:
        """All bytes on its device."""
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
    ways = _Ways.of(parallel)
    parts = parts_of_stage(model, layers, vocab_rows, first=first, last=last)
    return sum((_of_part(name, own, ways).times(n) for name, own, n in parts), Held(0))


def parts_of_stage(
    model: Model, layers: Sequence[Layer], vocab_rows: int, *, first: bool, last: bool
) -> Iterator[tuple[str, Sizes, int]]:
    """Yield what a pipeline stage is made of; see `held`.

    Yields:
        The letter of a layer, or the name of what is in no layer, for `tensors_of_part`; its sizes;
        how many of them there are.
    """
    sizes, block = sizes_of(model, vocab_rows), block_layers(model)
    if first:
        yield _MATRIX, sizes, 1
    for layer in layers:
        yield layer.letter, layer.sizes, 1
    if not last:
        return
    yield _NORM, sizes, 1
    if not (model.tie_embeddings and (first or block)):
        yield _MATRIX, sizes, 1
    if block:
        blocks = mtp_blocks(model)
        yield _BLOCK, sizes, blocks
        for layer in block:
            yield layer.letter, layer.sizes, blocks
        if not first:  # MTP embeds the tokens once more: a copy on the last stage
            yield _MATRIX, sizes, 1


def tensors_of_part(name: str, sizes: Sizes) -> Iterator[Parameter]:
    """Yield the tensors of a part of a stage that have gradients."""
    found = _OUTER[name](sizes) if name in _OUTER else parameters_of(name, sizes)
    yield from (one for one in found if not one.buffer)


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
    the copies of weights, quantized or transposed, that GEMMs are taken from. Whole tensors are
    offloaded until `optimizer.offload_share` is reached, so at most one more leaves the device.
    """
    parallel, full = job.parallel, job.precision.base is NumberFormat.fp32
    reduced_in_fp32 = full or job.precision.reduce_gradients_in_fp32
    dense, expert, precise = parameters.dense, parameters.expert, parameters.in_fp32
    if parallel.distributed_optimizer:
        copies = data_parallel(parallel, processes) * parallel.context
        dense, precise = -(-dense // copies), -(-precise // copies)
        expert = -(-expert // expert_data_parallel(parallel, processes))
    kept = dense + expert if parallel.fsdp else parameters.total
    kept_precise = precise if parallel.fsdp else parameters.in_fp32
    longer = 0 if full else kept_precise * (_FP32 - _HALF)
    state = (dense + expert) * _state_bytes(job.optimizer, masters=not full)
    if not full and not job.optimizer.reduced_state:  # what is float32 needs no master
        state -= precise * _FP32
    return Memory(
        weights=kept * (_FP32 if full else _HALF) + longer - parameters.in_fp8 * (_HALF - _FP8),
        gradients=kept * _FP32 if reduced_in_fp32 else kept * _HALF + longer,
        optimizer=state - int(job.optimizer.offload_share * state),
        host=int(job.optimizer.offload_share * (dense + expert)) * _HOSTED,
    )


def moment_bytes(adamw: AdamW) -> int:
    """Return the bytes of both moments of one parameter."""
    return _MOMENT[adamw.first_moment] + _MOMENT[adamw.second_moment]


def _state_bytes(adamw: AdamW, *, masters: bool) -> int:
    """Return what the optimizer keeps of one parameter.

    A float32 master is kept whole, or as the 16 bits that a bfloat16 weight lacks of it
    (`precision/formats.py`).
    """
    return moment_bytes(adamw) + masters * (_HALF if adamw.reduced_state else _FP32)


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
def _of_part(name: str, sizes: Sizes, ways: _Ways) -> Held:
    dense = expert = in_fp32 = 0
    for one in tensors_of_part(name, sizes):
        if one.of_experts:
            expert += one.elements(sizes) // (ways.expert * ways.expert_tensor)
        else:
            own = one.elements(sizes) // (1 if one.split is None else ways.tensor)
            dense += own
            in_fp32 += own if one.float32 else 0
    return Held(dense, expert, in_fp32=in_fp32)
