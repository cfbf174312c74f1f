"""Gateway to Megatron's distributed checkpoints: what is stored, under which global names."""

import contextlib
import logging
import queue
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hybrid_train.config.problems import UserError
from hybrid_train.runtime.seeds import random_state, restore_random_state

# Optimizer state by model parameter, so that any other layout can load it.
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds."""

    chunks: list[Any]  # model chunks of this process, wrapped for data parallelism
    optimizer: MegatronOptimizer
    groups: ProcessGroupCollection


def write(folder: Path, content: Content) -> None:
    """Write model, optimizer and random states into an empty folder; every process calls this."""
    models = _models(content.chunks, content.groups)
    sharded: dict[str, Any] = {
        **models,
        "optimizer": content.optimizer.sharded_state_dict(models, metadata=_metadata(content)),
        "random": _sharded_random_state(),
    }
    # Megatron core 0.19.2 would start a process for this queue (filesystem_async.py 65), which
    # takes as long as the start of the run; all is written by threads of this process.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(sharded, str(folder))


def read(folder: Path, content: Content) -> None:
    """Load model, optimizer and, on as many processes as before, random states."""
    models = _models(content.chunks, content.groups)
    sharded: dict[str, Any] = {
        **models,
        "optimizer": content.optimizer.sharded_state_dict(
            models, is_loading=True, metadata=_metadata(content)
        ),
    }
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    same_world = stored["random.torch"].global_shape[0] == dist.get_world_size()
    if same_world:
        sharded["random"] = _sharded_random_state()
    loaded = dist_checkpointing.load(sharded, str(folder))
    _load_models(content.chunks, loaded)
    _load_optimizer(content.optimizer, loaded["optimizer"])
    if same_world:
        restore_random_state({k: v[0] for k, v in loaded["random"].items()})
    else:
        _log.warning("another number of processes than before: random states start anew")


def read_weights(folder: Path, chunks: list[Any], groups: ProcessGroupCollection) -> None:
    """Load the weights alone, into wrapped or bare model chunks."""
    _load_models(chunks, dist_checkpointing.load(_models(chunks, groups), str(folder)))


def _metadata(content: Content) -> dict[str, Any]:
    return {**_OPTIMIZER_FORMAT, "dp_cp_group": content.groups.dp_cp}


def _models(chunks: list[Any], groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return the sharded state of each chunk; without the empty extra states of linear layers."""
    metadata = {"dp_cp_group": groups.dp_cp}
    return {
        f"model{number}": {
            name: value
            for name, value in bare(chunk).sharded_state_dict(metadata=metadata).items()
            if not name.endswith("_extra_state")
        }
        for number, chunk in enumerate(chunks)
    }


def _load_models(chunks: list[Any], loaded: Mapping[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        missing, unexpected = bare(chunk).load_state_dict(loaded[f"model{number}"], strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]
        assert not missing, missing
        assert not unexpected, unexpected


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what Megatron's distributed checkpoint gave back.

    Two corrections for torch's AdamW, core 0.19.2: the loader asks each parameter's saved tensors
    for a step count that it left out (distrib_optimizer.py 1223), and it gives all parameters one
    shared count, which a step would then raise once for each of them (distrib_optimizer.py 1040).
    """
    _require_same_parts(optimizer, state)
    with _without_step_tensors():
        optimizer.load_state_dict(state)
    for part in optimizer.chained_optimizers:
        for moments in part.optimizer.state.values():
            if "step" in moments:
                moments["step"] = moments["step"].clone()


def _require_same_parts(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Refuse state of another number of optimizers: split experts have one of their own."""
    count = len(optimizer.chained_optimizers)
    parts = [state] if count == 1 else [state.get(number, {}) for number in range(count)]
    if not all("optimizer" in part or "param_groups" in part for part in parts):
        raise UserError(
            "the optimizer state was saved with experts split (parallel.expert > 1) and is loaded "
            "without, or the other way round, which is not possible yet; keep parallel.expert, or "
            "start from the weights alone: checkpoint.load_only=weights run_dir=..."
        )


@contextlib.contextmanager
def _without_step_tensors() -> Iterator[None]:
    copy_tensors = DistributedOptimizer._set_main_param_and_optimizer_states

    def copy_present(self: DistributedOptimizer, parameter: Any, tensors: dict[str, Any]) -> None:
        copy_tensors(self, parameter, {"step": None, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = copy_present
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = copy_tensors


def bare(chunk: Any) -> Any:
    """Return the model inside its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _sharded_random_state() -> dict[str, ShardedTensor]:
    """Give the states of this process its row of a table over all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def row(name: str, state: Tensor) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(
            f"random.{name}", state.unsqueeze(0), (0, rank, world)
        )

    return {name: row(name, state) for name, state in random_state().items()}
