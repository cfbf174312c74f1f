"""What a run allocates and what its checkpoint stores, to the byte; and a built rank against it.

Megatron-Core keeps weights, gradients and optimizer state in flat buffers. With the distributed
optimizer each pipeline stage has up to three: for parameters in the format of the model, for those
that stay in float32, and for routed experts. Core begins each tensor at a multiple of 64 elements
and ends each bucket at a multiple of lcm(copies, 128), for as many processes as hold the same
parameters; each of those keeps the state of an equal range (optimizer/param_layout.py,
pad_param_start and pad_bucket_end; core 0.19.2). A matrix that two stages share has a bucket of its
own (distrib_optimizer.py 530). `memory` counts parameters alone: what is here beside that is
padding. Without the distributed optimizer nothing is padded.

In a checkpoint weights lie as they are; beside each both moments in float32, whatever the optimizer
keeps them in, and a float32 master where the weight is not float32
(`checkpoint/optimizer_state.py`). Each tensor is stored once, whatever the layout. Not counted:
random states and step counts, some kilobytes a process, and the one to two kilobytes that torch
writes around each tensor.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from hybrid_train.anatomy.axes import Sizes, sizes_of
from hybrid_train.anatomy.kinds import EMBEDDING, HEAD, Parameter, final_norm, mtp_block
from hybrid_train.anatomy.layers import block_layers, layers, main_layers, mtp_blocks
from hybrid_train.planning import stages
from hybrid_train.planning.degrees import data_parallel, expert_data_parallel, expert_tensor
from hybrid_train.planning.memory import (
    Memory,
    memory,
    moment_bytes,
    parts_of_stage,
    tensors_of_part,
)
from hybrid_train.schema.model import Model
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import NumberFormat
from hybrid_train.schema.train import TrainJob

_START, _END = 64, 128  # elements
_FP32, _HALF, _MOMENTS = 4, 2, 8  # bytes of an element
FILES_OF_ALL = (".metadata", "metadata.json", "position.json", "plan.json", "checksums.json")


@dataclass(frozen=True)
class Buffer:
    """One buffer of one pipeline stage.

    Attributes:
        elements: of its parameters.
        padded: elements of its memory.
        copies: processes that hold the same one, and share its state.
        weight_bytes: of an element.
        gradient_bytes: of an element.
        state_bytes: that the optimizer keeps of an element.
    """

    elements: int
    padded: int
    copies: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int

    @property
    def range(self) -> int:
        """Elements whose state one process keeps, those of padding included."""
        return self.padded // self.copies


def allocated(buffers: list[Buffer]) -> Memory:
    """Return the bytes of all memory of some buffers, and of the state of a range that is full."""
    return Memory(
        weights=sum(one.padded * one.weight_bytes for one in buffers),
        gradients=sum(one.padded * one.gradient_bytes for one in buffers),
        optimizer=sum(one.range * one.state_bytes for one in buffers),
    )


def buffers_of_rank(job: TrainJob, vocab_rows: int, rank: int, processes: int) -> list[Buffer]:
    """Return the buffers of one process of a pipeline rank, stage by stage.

    Each is one bucket, as without `parallel.overlap_grad_reduce`; FP8 primary weights, Megatron-
    FSDP and reduced-precision state have other ones.

    Args:
        job: a checked job.
        vocab_rows: rows of the embedding as they are stored.
        rank: of the pipeline.
        processes: on all machines together.
    """
    lengths = [len(one) for one in stages.cut(job, vocab_rows).stages]
    ends = list(accumulate(lengths))
    found: list[Buffer] = []
    for number in range(rank, len(ends), job.parallel.pipeline):
        first, last = number == 0, number == len(ends) - 1
        own = main_layers(job.model)[ends[number] - lengths[number] : ends[number]]
        parts = parts_of_stage(job.model, own, vocab_rows, first=first, last=last)
        tensors = [pair for name, sizes, n in parts for pair in _tensors(name, sizes) * n]
        found += _buffers(job, tensors, processes, shares=_shares(job, first=first, last=last))
    return found


def _tensors(name: str, sizes: Sizes) -> list[tuple[Parameter, Sizes]]:
    return [(one, sizes) for one in tensors_of_part(name, sizes)]


def _shares(job: TrainJob, *, first: bool, last: bool) -> bool:
    """Tell whether a stage has a matrix in common with another (language_module.py 252)."""
    twice = job.model.tie_embeddings or bool(block_layers(job.model))
    return twice and job.parallel.pipeline > 1 and first != last


def _buffers(
    job: TrainJob, tensors: list[tuple[Parameter, Sizes]], processes: int, *, shares: bool
) -> Iterator[Buffer]:
    """Lay out the tensors of a stage."""
    parallel, full = job.parallel, job.precision.base is NumberFormat.fp32
    dense = data_parallel(parallel, processes) * parallel.context
    of_experts = expert_data_parallel(parallel, processes)
    for experts, precise in ((False, False), (False, True), (True, False)):
        own = [
            (one, sizes)
            for one, sizes in tensors
            if (one.of_experts, one.float32 and not full) == (experts, precise)
        ]
        if not own:
            continue
        copies = of_experts if experts else dense
        in_fp32 = full or precise
        buckets = [own]
        if shares and not experts and not precise:
            shared = next(pair for pair in own if pair[0] is EMBEDDING)
            own.remove(shared)
            buckets.append([shared])
        elements = [list(_elements(bucket, parallel)) for bucket in buckets]
        split = parallel.distributed_optimizer
        yield Buffer(
            elements=sum(map(sum, elements)),
            padded=sum(_padded(one, copies) if split else sum(one) for one in elements),
            copies=copies if split else 1,
            weight_bytes=_FP32 if in_fp32 else _HALF,
            gradient_bytes=(_FP32 if in_fp32 or job.precision.reduce_gradients_in_fp32 else _HALF),
            state_bytes=moment_bytes(job.optimizer) + (0 if in_fp32 else _FP32),
        )


def _elements(tensors: list[tuple[Parameter, Sizes]], parallel: Parallel) -> Iterator[int]:
    """Yield the elements of each tensor of this process; each expert has tensors of its own."""
    for one, sizes in tensors:
        whole = math.prod(one.shape(sizes))
        if one.of_experts:
            yield from [whole // expert_tensor(parallel)] * (sizes.experts // parallel.expert)
        else:
            yield whole // (1 if one.split is None else parallel.tensor)


def _padded(tensors: list[int], copies: int) -> int:
    """Return the elements of a bucket; its end is a multiple of 64, too."""
    return _up(sum(_up(one, _START) for one in tensors), math.lcm(copies, _END))


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True)
class Place:
    """Which process of which run a rank is."""

    rank: int  # of the whole run
    pipeline_rank: int
    processes: int  # of the whole run
    vocab_rows: int  # of the embedding as they are stored


@dataclass(frozen=True)
class Compared:
    """One figure of one rank: what it is as built, and what `check` says of it."""

    rank: int
    pipeline_rank: int
    what: str
    built: int
    counted: int
    padding: int  # what core adds by its rules of alignment; of the optimizer, in this rank's range

    @property
    def difference(self) -> int:
        """What was allocated and is not accounted for."""
        return self.built - self.counted - self.padding


def compare(
    job: TrainJob, place: Place, parameters: int, built: Memory, empty: int
) -> Iterator[Compared]:
    """Hold a built rank against the plan.

    Args:
        job: of one phase.
        place: of the rank.
        parameters: its elements, without padding.
        built: bytes as allocated.
        empty: bytes of optimizer state that its range would have, were it not partly padding.
    """
    own = (place.vocab_rows, place.pipeline_rank, place.processes)
    held = stages.held_of_rank(stages.stages(job, place.vocab_rows), place.pipeline_rank)
    kept = memory(job, held, place.processes)
    most = allocated(buffers_of_rank(job, *own))
    at = (place.rank, place.pipeline_rank)
    yield Compared(*at, "parameters", parameters, held.total, 0)
    for what, less in (("weights", 0), ("gradients", 0), ("optimizer", empty)):
        bytes_built, said, whole = (getattr(one, what) for one in (built, kept, most))
        yield Compared(*at, what, bytes_built, said, whole - said - less)


def stored_bytes(job: TrainJob, vocab_rows: int) -> int:
    """Return the bytes of weights and optimizer state of the whole model.

    Args:
        job: a checked job.
        vocab_rows: rows of the embedding as they are stored.
    """
    full, model = job.precision.base is NumberFormat.fp32, job.model
    sizes = sizes_of(model, vocab_rows)
    found = sum(
        one.elements(layer.sizes) * _bytes(one, full=full)
        for layer in layers(model)
        for one in layer.parameters
    )
    outer = [EMBEDDING, *final_norm(sizes), *_head(model), *mtp_block(sizes) * mtp_blocks(model)]
    return found + sum(one.elements(sizes) * _bytes(one, full=full) for one in outer)


def _head(model: Model) -> list[Parameter]:
    return [] if model.tie_embeddings else [HEAD]


def _bytes(one: Parameter, *, full: bool) -> int:
    """Return the bytes of an element of a tensor and of what the optimizer has of it."""
    weight = _FP32 if full or one.float32 else _HALF
    if one.buffer:
        return weight
    return weight + _MOMENTS + (0 if weight == _FP32 else _FP32)
