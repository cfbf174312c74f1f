"""Networks into a checkpoint, and a checkpoint into networks of any layout.

A model and a checkpoint may differ in what serves training alone, and a run may begin or end with:
the layers of multi-token prediction (MTP), and the projections of a student's hidden states.
"""

import json
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from hybrid_train.checkpoint import safe_metadata
from hybrid_train.checkpoint.optimizer_state import (
    MASTER,
    STEP,
    StatePart,
    set_step_count,
    state_key,
    state_of,
    step_count,
)
from hybrid_train.checkpoint.shards import (
    Content,
    HeldNetwork,
    Shard,
    is_partition,
    quantize_loaded,
    shards_of,
)
from hybrid_train.checkpoint.writing import KeptSavePlan, Writing
from hybrid_train.megatron import checkpoints, written_for
from hybrid_train.megatron.checkpoints import ShardedTensor, Stored, is_main_replica
from hybrid_train.megatron.data_parallel import ProcessGroups
from hybrid_train.runtime import ranks
from hybrid_train.runtime.start import random_state, restore_random_state
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_BESIDE_WEIGHTS = ("optimizer.", "random.")
_OF_TRAINING = ("mtp.", "hidden_projections.")
_NAMED = 3  # tensors named in an error
# What reading damaged files raises; CheckpointException is no Exception.
_DAMAGE_ERRORS = (
    safe_metadata.UnreadableError,
    CheckpointException,
    checkpoints.DAMAGE_ERROR,
    OSError,
    EOFError,
    json.JSONDecodeError,
    pickle.UnpicklingError,
)
_log = logging.getLogger(__name__)


def start_writing(folder: Path, content: Content, plan: KeptSavePlan, *, copy: bool) -> Writing:
    """Begin to write into an empty folder; every process calls this.

    Args:
        folder: where to.
        content: models and optimizers.
        plan: of the last save of this run; it is used again, or made anew.
        copy: write from a copy in host memory, so that training may go on meanwhile.
    """
    steps = [torch.tensor([step_count(held.optimizer)]) for held in content.networks]
    tensors = [
        *plan.tensors(content),
        *_sharded_steps(content, steps),
        *_sharded_random_state().values(),
    ]
    fits = plan.fits(tensors)
    values = ranks.all_or_none(lambda: on_host(tensors, copy=copy))
    if not fits:
        _make_plan(folder, tensors, values, plan)
    return Writing(folder, *plan.writer(folder, values))


def _make_plan(
    folder: Path,
    tensors: list[ShardedTensor],
    values: list[Tensor | None],
    plan: KeptSavePlan,
) -> None:
    """Let Megatron plan; what it would write is left aside."""
    written_for.WHOLE_CHECKPOINT.put(_validate_global_plan=_is_whole)
    hosted = [
        tensor if value is None else replace(tensor, data=value)
        for tensor, value in zip(tensors, values, strict=True)
    ]
    plan.keep(tensors, *checkpoints.plan_save(folder, hosted))


def _is_whole(global_plan: list[SavePlan], metadata: Metadata) -> bool:
    """Tell whether a checkpoint that is planned holds every element of every tensor once."""
    tensors = metadata.state_dict_metadata.values()
    return all(
        is_partition(tensor.size, tensor.chunks)
        for tensor in tensors
        if isinstance(tensor, TensorStorageMetadata)
    )


def on_host(tensors: Iterable[ShardedTensor], *, copy: bool) -> list[Tensor | None]:
    """Bring what this process will write to host memory; from a GPU all are under way at once.

    Returns:
        The values of each tensor; None where another process writes it.

    Raises:
        UserError: if there is not enough of it.
    """
    ours = [tensor.data if is_main_replica(tensor.replica_id) else None for tensor in tensors]
    try:
        values = [
            None if data is None else data.detach().to("cpu", non_blocking=True, copy=copy)
            for data in ours
        ]
        torch.cuda.synchronize()
    except (MemoryError, RuntimeError) as error:  # torch has no error of its own for host memory
        needed = sum(data.nbytes for data in ours if data is not None)
        raise UserError(
            f"no copy of what this process saves, {needed / 1e6:.0f} MB, in host memory: {error}"
        ) from error
    return values


def read_content(folder: Path, content: Content) -> None:
    """Load models, optimizers and, on as many processes as before, random states.

    Raises:
        UserError: if the checkpoint is of another model; MTP alone may be more or less.
    """
    stored = _stored_in(folder)
    by_network = [_shards_of(held) for held in content.networks]
    found = [shard for of_one in by_network for shard in of_one]
    differences = compare_weights(folder, stored, found)
    steps = [torch.zeros(1, dtype=torch.int64) for _ in content.networks]
    counters = _sharded_steps(content, steps)
    _require_optimizer_state(folder, stored, counters)
    states = [
        state_of(held.optimizer, own)
        for held, own in zip(content.networks, by_network, strict=True)
    ]
    parts = [part for state in states for part in state.parts]
    random = _sharded_random_state()
    # Their sizes tell the number of processes, and the kind of device.
    same_random = all(
        part.key in stored and part.global_shape == stored[part.key].global_shape
        for part in random.values()
    )
    _load(
        folder,
        [
            *(_best_of(shard.weight, stored) for shard in differences.shared(found)),
            *(part.tensor for part in parts if part.is_stored(stored)),
            *counters,
            *(random.values() if same_random else ()),
        ],
    )
    quantize_loaded(found)
    _begin_new_state(folder, [part for part in parts if not part.is_stored(stored)], stored)
    for held, state, count in zip(content.networks, states, steps, strict=True):
        state.put_back()
        set_step_count(held.optimizer, int(count.item()))
    if same_random:
        restore_random_state({name: part.data[0] for name, part in random.items()})
    elif ranks.is_main():
        _log.warning(
            "another number of processes or kind of device than before: random states start anew"
        )


def read_weights(folder: Path, chunks: list[Any], groups: ProcessGroups, network: str = "") -> None:
    """Load the weights alone, into wrapped or bare model chunks; every process calls this.

    Args:
        folder: the checkpoint.
        chunks: model chunks of this process.
        groups: the processes that hold the other parts.
        network: name of one of several networks; empty where the checkpoint holds one.

    Raises:
        UserError: if the checkpoint is of another model; MTP alone may be more or less.
    """
    found = shards_of(chunks, groups, to_load=True, network=network)
    stored = _stored_in(folder)
    if network:
        stored = {key: one for key, one in stored.items() if key.startswith(f"{network}/")}
    shared = compare_weights(folder, stored, found).shared(found)
    _load(folder, [shard.weight for shard in shared])
    quantize_loaded(found, masters_follow=True)


def _shards_of(held: HeldNetwork) -> list[Shard]:
    return shards_of(held.chunks, held.groups, to_load=True, network=held.name)


def _sharded_steps(content: Content, steps: Sequence[Tensor]) -> list[ShardedTensor]:
    """Give the step count of each optimizer its name."""
    return [
        ShardedTensor.from_rank_offsets(
            f"{STEP}.{held.name}" if held.name else STEP, count, replica_id=dist.get_rank()
        )
        for held, count in zip(content.networks, steps, strict=True)
    ]


def _sharded_random_state() -> dict[str, ShardedTensor]:
    """Give the states of this process its row of a table over all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(
            f"random.{name}", state.unsqueeze(0), (0, rank, world)
        )
        for name, state in random_state().items()
    }


def _require_optimizer_state(
    folder: Path, stored: Stored, counters: Sequence[ShardedTensor]
) -> None:
    if any(one.key not in stored for one in counters):
        error = UserError(
            f"{folder} holds no optimizer state that this version reads; start from its weights: "
            "checkpoint.load_only=weights run_dir=..."
        )
        error.on_all_ranks = True
        raise error


def _load(folder: Path, tensors: list[ShardedTensor]) -> None:
    """Load into the memory of the tensors; every process calls this."""
    _reading(folder, lambda: checkpoints.load_into(folder, tensors))


def _stored_in(folder: Path) -> Stored:
    """List the tensors of a checkpoint; every process calls this."""
    return _reading(folder, lambda: checkpoints.stored_in(folder))


def _reading[T](folder: Path, work: Callable[[], T]) -> T:
    """Do what reads a checkpoint.

    Raises:
        UserError: on all processes, if any of them finds it damaged.
    """
    safe_metadata.install()  # no checkpoint runs code, whoever wrote it

    def explained() -> T:
        try:
            return work()
        except _DAMAGE_ERRORS as error:
            failures = getattr(error, "failures", {}).values()
            causes = ", ".join(str(failure[0]) for failure in failures) or error
            raise UserError(
                f"{folder} is damaged: {causes}; remove it, and the checkpoint before it is taken"
            ) from error

    return ranks.all_or_none(explained)


def _best_of(weight: ShardedTensor, stored: Stored) -> ShardedTensor:
    """Take a float32 weight from its master, where the run that saved it kept one."""
    master = state_key(MASTER, weight.key)
    if weight.dtype == torch.float32 and master in stored:
        return replace(weight, key=master)
    return weight


def _begin_new_state(folder: Path, new: list[StatePart], stored: Stored) -> None:
    """Begin state that is not in the checkpoint: moments at zero, masters with their weights."""
    for part in new:
        if part.kind != MASTER:
            part.tensor.data.zero_()
    masters = [part for part in new if part.kind == MASTER and part.weight_key in stored]
    _load(folder, [replace(part.tensor, key=part.weight_key) for part in masters])


@dataclass(frozen=True)
class Differences:
    """Names of weights that one side alone has."""

    new: frozenset[str]  # in the model, not in the checkpoint
    dropped: frozenset[str]  # in the checkpoint, not in the model

    def shared(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards that the checkpoint can fill."""
        return [shard for shard in shards if shard.weight.key not in self.new]


def compare_weights(folder: Path, stored: Stored, shards: Sequence[Shard]) -> Differences:
    """Compare a checkpoint with the model of all processes; say what differs.

    Raises:
        UserError: if more differs than what serves training alone.
    """
    wanted = _of_all_processes(shard.weight.key for shard in shards)
    saved = {key for key in stored if not key.startswith(_BESIDE_WEIGHTS)}
    differences = Differences(frozenset(wanted - saved), frozenset(saved - wanted))
    foreign = [key for key in differences.new | differences.dropped if not _serves_training(key)]
    if foreign:
        error = UserError(
            f"{folder} is of another model; only MTP may be added or dropped\n"
            f"  not in the checkpoint: {_some_of(differences.new)}\n"
            f"  not in the model: {_some_of(differences.dropped)}"
        )
        error.on_all_ranks = True
        raise error
    if differences.new and ranks.is_main():
        _log.warning(
            "not in the checkpoint, newly initialised with moments 0: %s",
            _count_by_block(differences.new),
        )
    if differences.dropped and ranks.is_main():
        _log.warning(
            "not in the model, dropped with their moments: %s", _count_by_block(differences.dropped)
        )
    return differences


def _serves_training(key: str) -> bool:
    name = key.rpartition("/")[2]  # behind the name of the network, if it has one
    return name.startswith(_OF_TRAINING)


def _of_all_processes(keys: Iterable[str]) -> set[str]:
    everyone: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, set(keys))
    return set().union(*everyone)


def _count_by_block(keys: Iterable[str]) -> str:
    """Count the tensors of each MTP block: "mtp.layers.0 (12 tensors)"."""
    blocks = Counter(".".join(key.split(".")[:3]) for key in keys)
    return ", ".join(
        f"{block} ({counted(number, 'tensor')})" for block, number in sorted(blocks.items())
    )


def _some_of(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more if names else "nothing"
