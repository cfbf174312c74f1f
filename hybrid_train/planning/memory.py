"""What one process holds of a model: parameters, and the bytes of what training keeps of them.

Plain integers and no torch. Not counted: activations, and buffers such as the expert biases.
"""

from dataclasses import dataclass

from hybrid_train.anatomy import counts
from hybrid_train.anatomy.product_formats import kept_in_fp8
from hybrid_train.planning.degrees import data_parallel, expert_data_parallel, expert_tensor
from hybrid_train.planning.product_sizes import weight_sizes
from hybrid_train.schema.model import Model
from hybrid_train.schema.optimizer import AdamW, MomentFormat
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.pattern import parse
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
    in_fp8: int = 0  # of both, with the weights kept in FP8

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
    model: Model, parallel: Parallel, layers: str, vocab_rows: int, *, first: bool, last: bool
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
    pattern = parse(model.pattern)
    matrix = Held(vocab_rows * model.hidden_size // parallel.tensor)
    found = matrix if first else Held(0)
    for letter in layers:
        found += _layer(model, parallel, letter)
    if not last:
        return found
    found += Held(model.hidden_size)
    if not (model.tie_embeddings and (first or pattern.mtp)):
        found += matrix
    if pattern.mtp:
        found += _mtp(model, parallel)
        if not first:  # MTP embeds the tokens once more: a copy on the last stage
            found += matrix
    return found


def held_in_fp8(job: TrainJob, layers: range) -> int:
    """Count the parameters that one process keeps in FP8 of some of the main layers, from 1."""
    local_experts = job.model.moe.experts // job.parallel.expert
    found = 0
    for linear in kept_in_fp8(job.model, job.precision):
        if linear.layer in layers:
            inner, outer = weight_sizes(job, linear.module)
            copies = local_experts if ".experts." in linear.module else 1
            found += copies * inner.value * outer.value
    return found


def memory(job: TrainJob, parameters: Held, processes: int) -> Memory:
    """Return the bytes that training keeps of the parameters of one process.

    The distributed optimizer splits its state over the processes that hold the same parameters
    (Rajbhandari et al., arXiv:1910.02054, stage 1). FSDP splits weights and gradients too (stage
    3); the layer that runs is whole meanwhile, and not counted. The scales of moments in 16 and 8
    bits and of weights in FP8, four bytes for a tensor or a block, are not counted either, nor are
    the copies of weights, quantized or transposed, that products are taken from.
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
    (`precision/remainders.py`).
    """
    moments = _MOMENT[adamw.first_moment] + _MOMENT[adamw.second_moment]
    return moments + masters * (_HALF if adamw.lowered else _FP32)


def _layer(model: Model, parallel: Parallel, letter: str) -> Held:
    """Count one layer: its norm is whole on every rank, all else is split over tensor ranks."""
    if letter == "E":
        return _experts(model, parallel)
    split = counts.layer_parameters(model, letter) - model.hidden_size
    return Held(model.hidden_size + split // parallel.tensor)


def _experts(model: Model, parallel: Parallel) -> Held:
    """Count an expert layer: norm, router and latent projections are whole on every rank."""
    moe = model.moe
    whole = model.hidden_size * (1 + moe.experts + 2 * (moe.latent_size or 0))
    shared = 2 * model.hidden_size * (moe.shared_intermediate_size or 0)
    routed = moe.experts * 2 * (moe.latent_size or model.hidden_size) * moe.intermediate_size
    return Held(
        dense=whole + shared // parallel.tensor,
        expert=routed // (parallel.expert * expert_tensor(parallel)),
    )


def _mtp(model: Model, parallel: Parallel) -> Held:
    """Count the MTP blocks: eh_proj (h x 2h) is split, three norms are whole."""
    pattern = parse(model.pattern)
    hidden = model.hidden_size
    block = Held(2 * hidden**2 // parallel.tensor + 3 * hidden)
    for letter in pattern.mtp:
        block += _layer(model, parallel, letter)
    return block.times(1 if model.mtp.repeated_block else pattern.mtp_depths)
