"""The optimizer's tensors under the names of the parameters they belong to, cut like their shards.

    optimizer.exp_avg.KEY  optimizer.exp_avg_sq.KEY  optimizer.master.KEY  optimizer.step

KEY is the name of a weight in the checkpoint. How Megatron chains optimizers (one more for split
experts), in which buffers it flattens parameters and how it deals them out to data-parallel ranks
leaves no trace, so state that was saved under one layout is read under any other. A master weight
is stored where the weight itself is not float32. Rates, decays and betas are not stored: the config
says them.

Core 0.19.2 has a format of its own for this, "fully_reshardable" (distrib_optimizer.py 1690). It is
not used: its tree mirrors the chain of optimizers (optimizer.py 1556), so a checkpoint with split
experts cannot be read without, and on saving every data-parallel rank gathers the whole state.

Reduced-precision state is stored in float32, so that it is read by a run of any precision. It is
brought to float32 in host memory, and put back behind a load.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_train.checkpoint.shards import (
    Shard,
    chunk_of,
    only_copy,
    tensor_chunks,
)
from hybrid_train.megatron.checkpoints import ShardedTensor, Stored
from hybrid_train.megatron.optimizers import (
    MegatronOptimizer,
    is_distributed_part,
    keeps_reduced_precision,
    own_part,
    reload_float32,
    state_of_updated,
    torch_optimizers,
    updated_by,
    working_parts,
)
from hybrid_train.precision import formats

PREFIX = "optimizer."
MASTER = "master"
STEP = f"{PREFIX}step"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KEPT_AS = {MASTER: "master_param"}  # names of FusedAdam, where they are not ours


def state_key(kind: str, weight_key: str) -> str:
    """Return the name of an optimizer tensor in a checkpoint."""
    return f"{PREFIX}{kind}.{weight_key}"


@dataclass(frozen=True)
class StatePart:
    """A chunk of one optimizer tensor of the whole model; loading into it loads the optimizer."""

    kind: str  # "exp_avg", "exp_avg_sq" or "master"
    weight_key: str
    tensor: ShardedTensor

    def is_stored(self, stored: Stored) -> bool:
        """Tell whether a checkpoint can fill it: not if it lacks the weight, or only the master."""
        return self.tensor.key in stored or (self.kind != MASTER and self.weight_key in stored)


@dataclass(frozen=True)
class _Fragment:
    """What an optimizer of this process keeps for a range of a parameter's elements."""

    parameter: Tensor
    start: int  # first element of the range
    tensors: dict[str, Tensor]  # by kind, flat
    is_only_copy: bool  # no other data-parallel rank keeps the same range
    put_back: Callable[[], None] | None = None  # brings what was loaded where it is updated

    @property
    def stop(self) -> int:
        """Element behind the last one of the range."""
        return self.start + next(iter(self.tensors.values())).numel()


@dataclass(frozen=True)
class OptimizerState:
    """What the optimizer of this process keeps."""

    parts: list[StatePart]
    fragments: list[_Fragment]

    def put_back(self) -> None:
        """Give the optimizer what was loaded, where it keeps that in fewer bits or elsewhere.

        The weights are loaded before: remainders are what they differ by from the masters.
        """
        for fragment in self.fragments:
            if fragment.put_back is not None:
                fragment.put_back()


def state_of(optimizer: MegatronOptimizer, shards: Sequence[Shard]) -> OptimizerState:
    """List moments and master weights of this process by the shards of their parameters."""
    of_parameter: dict[int, list[Shard]] = {}
    for shard in shards:
        of_parameter.setdefault(id(shard.owner), []).append(shard)
    fragments = list(_fragments(optimizer))
    parts = [
        part
        for fragment in fragments
        for shard in of_parameter[id(fragment.parameter)]
        for part in _overlap(fragment, shard)
    ]
    return OptimizerState(parts, fragments)


def state_parts(optimizer: MegatronOptimizer, shards: Sequence[Shard]) -> list[StatePart]:
    """List what a checkpoint stores of the optimizer; see `state_of`."""
    return state_of(optimizer, shards).parts


def kept_tensors(optimizer: MegatronOptimizer) -> list[Tensor] | None:
    """List the memory that `state_parts` shares with the optimizer; None if it has its own."""
    found: list[Tensor] = []
    for part in working_parts(optimizer):
        if keeps_reduced_precision(part):
            return None
        for inner in torch_optimizers(part):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    state = inner.state.get(parameter, {})
                    found += [parameter, *(state[kind] for kind in _MOMENTS if kind in state)]
    return found


def _overlap(fragment: _Fragment, shard: Shard) -> Iterator[StatePart]:
    """Cut what a fragment and a shard have in common into chunks of the whole tensor."""
    weight = shard.weight
    start = max(fragment.start, shard.start)
    stop = min(fragment.stop, shard.start + math.prod(weight.local_shape))
    for tensor_chunk in tensor_chunks(weight.local_shape, start - shard.start, stop - shard.start):
        for kind, values in fragment.tensors.items():
            part = values[start - fragment.start :][: tensor_chunk.numel]
            tensor = chunk_of(weight, state_key(kind, weight.key), part, tensor_chunk)
            yield StatePart(
                kind, weight.key, only_copy(tensor) if fragment.is_only_copy else tensor
            )
        start += tensor_chunk.numel


def _fragments(optimizer: MegatronOptimizer) -> Iterator[_Fragment]:
    """Yield what each chained optimizer of this process keeps; moments exist from here on."""
    for part in working_parts(optimizer):
        if keeps_reduced_precision(part):
            yield from _reduced_fragments(part)
            continue
        if not part.optimizer.state and part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
        for parameter, start, master in updated_by(part):
            state = state_of_updated(part, master)
            tensors = {kind: own_part(state[kind]).view(-1) for kind in _MOMENTS}
            if parameter.dtype != torch.float32:
                tensors[MASTER] = own_part(master).view(-1)
            again = reload_float32(part, master)
            yield _Fragment(parameter, start, tensors, is_distributed_part(part), again)


def _reduced_fragments(part: Any) -> Iterator[_Fragment]:
    """Bring what FusedAdam keeps to float32, parameter by parameter, in host memory."""
    adam = part.optimizer
    for parameter, start, shard in updated_by(part):
        if not adam.state[shard]:
            halves = adam.store_param_remainders and shard.dtype == torch.bfloat16
            adam.initialize_state(shard, halves)
        kinds = [*_MOMENTS, *([MASTER] if parameter.dtype != torch.float32 else [])]
        tensors = {kind: _unscaled(adam, shard, kind) for kind in kinds}
        yield _Fragment(parameter, start, tensors, True, _returner(adam, shard, tensors))


def _unscaled(adam: Any, shard: Tensor, kind: str) -> Tensor:
    """Return state in float32, flat."""
    kept = adam.get_unscaled_state(shard, _KEPT_AS.get(kind, kind))
    if kept.dtype == torch.int16:
        kept = formats.join_remainder(shard, kept)
    return kept.detach().cpu().view(-1)


def _returner(adam: Any, shard: Tensor, tensors: dict[str, Tensor]) -> Callable[[], None]:
    def put_back() -> None:
        for kind, values in tensors.items():
            name, here = _KEPT_AS.get(kind, kind), values.to(shard.device)
            if adam.state[shard][name].dtype == torch.int16:
                here = formats.remainder_of(here, shard)
            adam.set_scaled_state(shard, name, here)

    return put_back


def step_count(optimizer: MegatronOptimizer) -> int:
    """Return how many steps the optimizer has taken; every process calls this."""
    counts = [int(holder["step"]) for holder in _step_holders(optimizer) if "step" in holder]
    most = torch.tensor(max(counts, default=0), device=torch.cuda.current_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())


def set_step_count(optimizer: MegatronOptimizer, steps: int) -> None:
    """Set the count of all parameters, of new ones too.

    Adam's correction of the bias towards zero is then missing in a new parameter's first steps,
    which are smaller for it, as in a warmup.
    """
    for holder in _step_holders(optimizer):
        if isinstance(holder.get("step"), Tensor):
            holder["step"].fill_(steps)
        else:
            holder["step"] = steps


def _step_holders(optimizer: MegatronOptimizer) -> Iterator[dict[str, Any]]:
    """Yield what counts steps: torch's AdamW by parameter, Transformer Engine's by group."""
    for part in working_parts(optimizer):
        for inner in torch_optimizers(part):
            by_parameter = isinstance(inner, torch.optim.AdamW)
            yield from inner.state.values() if by_parameter else inner.param_groups
