"""Calls into Megatron's distributed checkpointing, and the sharded tensors that they are given.

Megatron says where a parameter belongs in the whole model by what the modules hold. A weight that
has no memory of its own, or none that could be cut into its parts, is asked for by a stand-in: a
tensor that the module holds for a while in its place.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, fp8_utils
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
)
from megatron.core.dist_checkpointing.mapping import (
    is_main_replica as is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync as Writer,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.nn import Module, Parameter

Stored = Mapping[str, ShardedTensor]  # name -> size and format of a tensor of a checkpoint
DAMAGE_ERROR = CheckpointingException  # what core raises where files are not what it wrote
_FORMAT = CheckpointingConfig("torch_dist", 1)  # Megatron's words


def plan_save(folder: Path, tensors: Iterable[ShardedTensor]) -> tuple[Writer, Metadata | None]:
    """Let Megatron plan a save; what it would write is left aside. Every process calls this.

    Returns:
        The writer of what this process would write; the description of the whole checkpoint, on the
        first process.
    """
    strategy = _Strategy()
    dist_checkpointing.save(
        _numbered(tensors), str(folder), strategy, async_sharded_save=True, async_strategy="mcore"
    )
    return strategy.writer, strategy.metadata


def load_into(folder: Path, tensors: list[ShardedTensor]) -> None:
    """Load into the memory of the tensors; every process calls this."""
    memory = [tensor.data.data_ptr() for tensor in tensors]
    loaded = dist_checkpointing.load(_numbered(tensors), str(folder))
    assert memory == [loaded[str(number)].data_ptr() for number in range(len(tensors))]


def stored_in(folder: Path) -> Stored:
    """List the tensors of a checkpoint; every process calls this."""
    found: Stored = dist_checkpointing.load_tensors_metadata(str(folder))
    return found


def mark_as_megatrons(folder: Path) -> None:
    """Write the file by which Megatron knows its checkpoints."""
    save_config(_FORMAT, str(folder))


def _numbered(tensors: Iterable[ShardedTensor]) -> dict[str, ShardedTensor]:
    """Make the dictionary that Megatron asks for; its keys do not reach the file."""
    return {str(number): tensor for number, tensor in enumerate(tensors)}


class _Strategy(TorchDistSaveShardedStrategy):
    """Keeps what is planned: the writing and the end of a save are ours (`checkpoint/writing.py`).

    In core 0.19.2 a failed write loses its reason on the way (filesystem_async.py 292), and where
    the first process cannot write the description of the checkpoint, the others wait for it without
    end (state_dict_saver.py 245).
    """

    writer: Writer
    metadata: Metadata | None  # of the whole checkpoint; on the first process

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, strategy: str) -> Any:
        self.writer, self.metadata, _ = planned
        return super()._get_save_and_finalize_callbacks(writer, planned, strategy)


def sharded_tensors(chunk: Any) -> Iterator[ShardedTensor]:
    """Yield each tensor of a bare chunk with its place in the whole model; packed ones by part."""
    for entry in sharded_entries(chunk).values():
        yield from tensors_of_entry(entry)


def sharded_entries(chunk: Any, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what the modules of a chunk say of their tensors, by the names that they have there.

    The extra state of linear layers, which is no tensor and empty, is left out.

    Args:
        chunk: a bare model chunk.
        metadata: of Megatron: process groups.
    """
    found: dict[str, Any] = chunk.sharded_state_dict(metadata=metadata)
    return {name: one for name, one in found.items() if not name.endswith("_extra_state")}


def tensors_of_entry(entry: Any) -> Iterator[ShardedTensor]:
    """Yield the tensors of an entry, packed ones by part."""
    tree = {"": entry}
    apply_factories(tree)
    yield from _leaves(tree[""])


def _leaves(tree: Any) -> Iterator[ShardedTensor]:
    if isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
        return
    assert isinstance(tree, ShardedTensor), type(tree)
    yield tree


def is_in_fp8(weight: Tensor) -> bool:
    """Tell whether a weight is kept in FP8, by us or by Transformer Engine."""
    return bool(fp8_utils.is_float8tensor(weight))


@contextlib.contextmanager
def plain_weights(
    model: Module, *, without_memory: bool = False
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let empty tensors stand for the weights in FP8, in the type that those claim to have.

    Args:
        model: any module.
        without_memory: ask for places alone, where values do not matter.

    Yields:
        Each weight in FP8 and what stands for it.
    """

    def make(parameter: Tensor) -> Tensor | None:
        if not is_in_fp8(parameter):
            return None
        return empty_like(parameter, "meta" if without_memory else parameter.device)

    with stand_ins(model, make, weight=lambda parameter: parameter) as pairs:
        yield pairs


@contextlib.contextmanager
def stand_ins(
    model: Module, make: Callable[[Tensor], Tensor | None], weight: Callable[[Tensor], Tensor]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let the modules of a model hold other tensors in place of parameters.

    Args:
        model: any module.
        make: weight -> what stands for it, once for a weight that several modules share; None:
            nothing does.
        weight: parameter of a module -> the weight that is meant.

    Yields:
        Each weight and what stands for it.
    """
    made: dict[int, Tensor | None] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    held: list[tuple[Module, str, Parameter]] = []
    for module in model.modules():
        for name, current in module._parameters.items():
            if current is None:
                continue
            meant = weight(current)
            if id(meant) not in made:
                stand_in = made[id(meant)] = make(meant)
                pairs += [] if stand_in is None else [(meant, stand_in)]
            if made[id(meant)] is not None:
                held.append((module, name, current))
    try:
        for module, name, current in held:
            module._parameters[name] = made[id(weight(current))]  # type: ignore[assignment]
        yield pairs
    finally:
        for module, name, current in held:
            module._parameters[name] = current


def empty_like(parameter: Tensor, device: torch.device | str) -> Parameter:
    """Return a parameter without values that Megatron takes for the same one, split likewise."""
    empty = Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
    vars(empty).update(vars(parameter))
    return empty
