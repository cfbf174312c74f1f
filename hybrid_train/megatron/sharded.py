"""Tensors with their place in the whole model, as Megatron describes them."""

from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)

__all__ = ["ShardedTensor", "entries", "is_main_replica", "parts", "sharded_tensors"]


def entries(chunk: Any, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what the modules of a chunk say of their tensors, by the names that they have there.

    The extra state of linear layers, which is no tensor and empty, is left out.

    Args:
        chunk: a bare model chunk.
        metadata: of Megatron: process groups.
    """
    found: dict[str, Any] = chunk.sharded_state_dict(metadata=metadata)
    return {name: one for name, one in found.items() if not name.endswith("_extra_state")}


def sharded_tensors(chunk: Any) -> Iterator[ShardedTensor]:
    """Yield each tensor of a bare chunk with its place in the whole model; packed ones by part."""
    for entry in entries(chunk).values():
        yield from parts(entry)


def parts(entry: Any) -> Iterator[ShardedTensor]:
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
