"""One rank of a run at its true size, built by Megatron's own classes without memory, and counted.

Nobody else is there, and nothing has values: torch's meta device stands for the GPU. A rank that
holds 4 GB of weights and 16 GB of gradients takes a second or two and no memory. What is counted is
what was allocated: the buffers of weights and gradients, and the optimizer's tensors.
"""

import contextlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hybrid_train.checkpoint.shards import Content, HeldNetwork
from hybrid_train.checkpoint.writing import KeptSavePlan
from hybrid_train.jobs.networks import build_network
from hybrid_train.megatron.checkpoints import is_main_replica
from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
from hybrid_train.megatron.optimizers import padding_of_range, working_parts
from hybrid_train.model.build import build_model
from hybrid_train.planning.allocation import Compared, Place, compare
from hybrid_train.planning.memory import Memory
from hybrid_train.runtime import cpu
from hybrid_train.runtime.replacements import OBJECTS
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from hybrid_train.schema.train import TrainJob
from hybrid_train.training.network import Network

_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch counts steps beside them, on a CPU alone
_MOMENTS_BYTES, _MASTER_BYTES = 8, 4


@dataclass(frozen=True)
class BuiltRank:
    """What one rank allocated, against what was planned, and what it writes of a checkpoint."""

    figures: list[Compared]
    saved: int  # bytes


def build_rank(job: TrainJob, vocab_rows: int, rank: int, processes: int) -> BuiltRank:
    """Build one rank of a checked run, count and forget it.

    Args:
        job: of one phase.
        vocab_rows: rows of the embedding as they are stored; a tokenizer may have less.
        rank: of the whole run.
        processes: of the whole run.
    """
    runtime = Runtime(device=Device.cpu, kernels=Kernels.plain)
    # Overlap cuts buffers into more buckets, each with an end of its own, in the order of the
    # modules: some kilobytes that no plan counts.
    whole = replace(job.parallel, overlap_grad_reduce=False, overlap_param_gather=False)
    # State that is offloaded is the same elsewhere: all of it is counted where it would be.
    adamw = replace(job.optimizer, offload_share=0)
    job = replace(job, runtime=runtime, parallel=whole, optimizer=adamw)
    with one_rank(rank, processes):
        groups = build_groups(job.parallel, runtime.timeout_s)
        try:
            built = build_model(job, groups, job.model.vocab_size or vocab_rows, on_gpu=False)
            network = build_network(job, built, groups, torch.device("meta"))
            return _counted(job, network, Place(rank, groups.pp.rank(), processes, vocab_rows))
        finally:
            destroy_groups()


def _counted(job: TrainJob, network: Network, place: Place) -> BuiltRank:
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
    kept = Memory(
        weights=sum(weights.values()),
        gradients=sum(one.grad_data.nbytes for one in buffers),
        optimizer=sum(one.nbytes for part in parts for one in _state(part, weights)),
    )
    empty = sum(
        elements * (_MOMENTS_BYTES + (0 if dtype == torch.float32 else _MASTER_BYTES))
        for part in parts
        for dtype, elements in padding_of_range(part)
    )
    parameters = sum(p.numel() for chunk in network.chunks for p in chunk.parameters())
    figures = list(compare(job, place, parameters, kept, empty))
    return BuiltRank(figures, sum(_saved(network)))


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


@contextlib.contextmanager
def one_rank(rank: int, processes: int) -> Iterator[None]:
    """Be a rank of a run of so many processes for as long as the block lasts.

    torch's process group "fake" answers each collective at once, and its meta device gives tensors
    sizes and formats alone. What a rank hears from others is what it says itself.

    Raises:
        UserError: if a GPU is visible.
    """
    cpu.install()
    others = OBJECTS.present()
    OBJECTS.put(all_gather_object=_say_for_all)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        with cpu.without_memory():
            yield
    finally:
        dist.destroy_process_group()
        OBJECTS.put(**others)


def _say_for_all(heard: list[Any], said: Any, group: Any = None) -> None:
    """Stand for `all_gather_object` where all ranks say the same."""
    del group
    heard[:] = [said] * len(heard)
