"""Which part of which tensor of the whole model each tensor of this process is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A range of one tensor of this process, and where it belongs in the whole model."""

    owner: Tensor  # parameter or buffer
    start: int  # first element of the range, counted in the flat owner
    weight: ShardedTensor  # shares the owner's memory


def places(chunks: list[Any], groups: ProcessGroupCollection) -> list[Place]:
    """List the parameters and persistent buffers of the model chunks of this process.

    Names are those of the whole model: layers are numbered through all stages. A tensor that packs
    several (the projections and convolutions of Mamba) has a place for each.
    """
    metadata = {"dp_cp_group": groups.dp_cp}
    found: list[Place] = []
    for chunk in chunks:
        for name, whole in bare(chunk).sharded_state_dict(metadata=metadata).items():
            if name.endswith("_extra_state"):  # of linear layers, empty
                continue
            tree, owner = {name: whole}, whole.data
            apply_factories(tree)
            for part in _leaves(tree[name]):
                assert part.data.is_contiguous(), f"{part.key} is no range of its tensor"
                distance = part.data.data_ptr() - owner.data_ptr()
                found.append(Place(owner, distance // owner.element_size(), part))
    return found


def _leaves(tree: Any) -> Iterator[ShardedTensor]:
    if isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
        return
    assert isinstance(tree, ShardedTensor), type(tree)
    yield tree


def bare(chunk: Any) -> Any:
    """Return the model inside its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
