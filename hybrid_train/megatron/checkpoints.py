"""Megatron's distributed checkpoints: the calls that list, load, plan and describe them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync as Writer,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata

from hybrid_train.megatron.sharded import ShardedTensor

Stored = Mapping[str, ShardedTensor]  # name -> size and format of a tensor of a checkpoint
DAMAGED = CheckpointingException  # what core raises where files are not what it wrote
_FORMAT = CheckpointingConfig("torch_dist", 1)  # Megatron's words


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


def plan(folder: Path, tensors: Iterable[ShardedTensor]) -> tuple[Writer, Metadata | None]:
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


def load(folder: Path, tensors: list[ShardedTensor]) -> None:
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
