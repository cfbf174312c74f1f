"""One rank of a run at its true size, built by Megatron's own classes without memory, and counted.

A rank that holds 4 GB of weights and 16 GB of gradients takes a second or two and no memory. What
is counted is what was allocated: the buffers of weights and gradients, and the optimizer's tensors.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybrid_train.checkpoint.shards import Content, HeldNetwork
from hybrid_train.checkpoint.writing import KeptSavePlan
from hybrid_train.jobs.networks import build_network
from hybrid_train.megatron.checkpoints import is_main_replica
from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
from hybrid_train.megatron.optimizers import padding_of_range, working_parts
from hybrid_train.model.build import build_model
from hybrid_train.planning.memory import Memory
from hybrid_train.runtime.one_rank import one_rank
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from hybrid_train.schema.train import TrainJob
from hybrid_train.training.network import Network

_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch counts steps beside them, on a CPU alone
_MOMENTS_BYTES, _MASTER_BYTES = 8, 4


@dataclass(frozen=True)
class BuiltRank:
    """What one rank allocated.

    Attributes:
        rank: of the whole run.
        pipeline_rank: its place in the pipeline.
        parameters: elements, without padding.
        kept: bytes of weights, gradients and optimizer state as allocated.
        empty: bytes of optimizer state that its range would have, were it not partly padding.
        saved: bytes that it writes of a checkpoint.
    """

    rank: int
    pipeline_rank: int
    parameters: int
    kept: Memory
    empty: int
    saved: int


def build_rank(job: TrainJob, vocab_rows: int, rank: int, processes: int) -> BuiltRank:
    """Build one rank of a checked run, count and forget it.

    Args:
        job: of one phase.
        vocab_rows: rows of the embedding as they are stored; a tokenizer may have less.
        rank: of the whole run.
        processes: of the whole run.
    """
    runtime = Runtime(device=Device.cpu, kernels=Kernels.plain)
    job = replace(job, runtime=runtime)
    with one_rank(rank, processes):
        groups = build_groups(job.parallel, runtime.timeout_s)
        try:
            built = build_model(job, groups, job.model.vocab_size or vocab_rows, on_gpu=False)
            network = build_network(job, built, groups, torch.device("meta"))
            return _counted(network, rank, groups.pp.rank())
        finally:
            destroy_groups()


def _counted(network: Network, rank: int, pipeline_rank: int) -> BuiltRank:
    assert network.optimizer is not None, "it is trained"
    weights = {
        _memory_of(tensor): tensor.untyped_storage().nbytes()
        for chunk in network.chunks
        for tensor in chunk.parameters()
    }
    buffers = [
        one for chunk in network.chunks for one in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    parts = list(working_parts(network.optimizer))
    return BuiltRank(
        rank,
        pipeline_rank,
        parameters=sum(p.numel() for chunk in network.chunks for p in chunk.parameters()),
        kept=Memory(
            weights=sum(weights.values()),
            gradients=sum(one.grad_data.nbytes for one in buffers),
            optimizer=sum(one.nbytes for part in parts for one in _state(part, weights)),
        ),
        empty=sum(
            elements * (_MOMENTS_BYTES + (0 if dtype == torch.float32 else _MASTER_BYTES))
            for part in parts
            for dtype, elements in padding_of_range(part)
        ),
        saved=sum(_saved(network)),
    )


def _memory_of(tensor: Tensor) -> int:
    """Name the memory of a tensor; without values it has no address."""
    name: int = tensor.untyped_storage()._cdata
    return name


def _state(part: Any, weights: Container[int]) -> Iterator[Tensor]:
    """Yield moments of a chained optimizer, and masters: a float32 weight is its own."""
    for parameter, state in part.optimizer.state.items():
        yield from (state[kind] for kind in _MOMENTS)
        if _memory_of(parameter) not in weights:
            yield parameter


def _saved(network: Network) -> Iterator[int]:
    """Yield the bytes of each tensor that this rank writes into a checkpoint."""
    held = HeldNetwork(network.chunks, network.optimizer, network.groups)
    for tensor in KeptSavePlan().tensors(Content((held,))):
        if is_main_replica(tensor.replica_id):
            yield tensor.data.nbytes
