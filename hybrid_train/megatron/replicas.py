"""Weights that several processes hold alike, and whether they still do.

A bit that turns in the memory of one GPU, or a kernel that computes wrongly once, raises no error:
the copies of a weight drift apart, and the loss says so long after. Here each process sums up its
weights, and the sums are compared within the groups that should hold the same.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_train.megatron.checkpoints import is_in_fp8
from hybrid_train.megatron.data_parallel import Chunks, ProcessGroups, complete_parameters

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_BIAS = "expert_bias"  # the one buffer of weights that training changes


@dataclass(frozen=True)
class Difference:
    """A tensor that should be the same in all processes of a group, and is not.

    Attributes:
        name: of the tensor.
        ranks: of the run, whose copies are not those of most; all, where no copy is.
    """

    name: str
    ranks: tuple[int, ...]


def different_replicas(chunks: Chunks, groups: ProcessGroups) -> list[Difference]:
    """Compare all weights that other processes hold too; every process of the run calls this.

    Megatron-FSDP keeps no weight twice, and is refused. With `overlap_param_gather` each rank gets
    the weights of the others anew before it uses them, and so before they are compared: what one
    lost of those is mended by then; what tensor ranks share, and biases of experts, are not.

    Returns:
        The same list on all processes of a group; others may find other tensors, or none.
    """
    complete_parameters(chunks)
    found: list[Difference] = []
    for group, named in _by_group(chunks, groups):
        found += _compare(named, group)
    return found


@torch.no_grad()
def _by_group(
    chunks: Chunks, groups: ProcessGroups
) -> Iterator[tuple[Any, list[tuple[str, Tensor]]]]:
    """Yield groups of more than one process with the tensors that all of them hold alike."""
    of_group: dict[str, list[tuple[str, Tensor]]] = {"dp_cp": [], "expt_dp": [], "tp": []}
    for number, chunk in enumerate(chunks):
        prefix = f"chunk {number}: " if len(chunks) > 1 else ""
        for name, weight in chunk.module.named_parameters():
            is_expert = not getattr(weight, "allreduce", True)
            named = (prefix + name.removeprefix("module."), weight)
            of_group["expt_dp" if is_expert else "dp_cp"].append(named)
            if not is_expert and not getattr(weight, "tensor_model_parallel", False):
                of_group["tp"].append(named)
        for name, buffer in chunk.module.named_buffers():
            if name.endswith(_BIAS):
                named = (prefix + name.removeprefix("module."), buffer)
                of_group["dp_cp"].append(named)
                of_group["tp"].append(named)
    for name, tensors in of_group.items():
        group = getattr(groups, name)
        if group.size() > 1 and tensors:
            yield group, tensors


def _compare(named: Sequence[tuple[str, Tensor]], group: Any) -> list[Difference]:
    """Return what differs within a group; the sums of all members travel only if something does."""
    own = torch.stack([checksum(tensor) for _, tensor in named])
    least, most = own.clone(), own.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    wrong = (least != most).nonzero().flatten()
    if not len(wrong):
        return []
    sums = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(sums, own, group=group)
    ranks = dist.get_process_group_ranks(group)
    return [
        Difference(named[place][0], _unlike_most([int(one[place]) for one in sums], ranks))
        for place in wrong.tolist()
    ]


def _unlike_most(sums: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    (usual, count), *_ = Counter(sums).most_common()
    if 2 * count <= len(sums):
        return tuple(ranks)
    return tuple(rank for rank, one in zip(ranks, sums, strict=True) if one != usual)


def checksum(tensor: Tensor) -> Tensor:
    """Sum up the bits of a tensor: a whole number of 64 bits, [].

    Rows are summed as words and weighted with odd numbers modulo 2^64, so that each single turned
    bit changes the sum, and so do most exchanges of rows.
    """
    if is_in_fp8(tensor):
        tensor = tensor.dequantize()
    words = tensor.detach().contiguous().view(_WORDS[tensor.element_size()])
    rows = words.flatten(1).sum(dim=1, dtype=torch.int64) if words.dim() > 1 else words.long()
    weights = torch.arange(rows.numel(), device=rows.device, dtype=torch.int64) * 2 + 1
    return (rows.flatten() * weights).sum()
