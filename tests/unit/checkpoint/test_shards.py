"""Where the tensors of a process lie in the whole model."""

from typing import Any

import torch

from tests.tiny import MEGATRON_WARNINGS
from tests.unit.checkpoint.content import engine_of

pytestmark = MEGATRON_WARNINGS


def test_places_cover_every_parameter_and_buffer_once_and_share_its_memory(groups: Any) -> None:
    from hybrid_train.checkpoint.shards import bare, shards_of

    engine = engine_of(groups, seed=1)
    (chunk,) = engine.network.chunks
    found = shards_of([chunk], groups)
    state = bare(chunk).state_dict(keep_vars=True)
    tensors = {v.data_ptr(): v for v in state.values() if isinstance(v, torch.Tensor)}
    ranges: dict[int, list[tuple[int, int]]] = {}
    for shard in found:
        assert shard.weight.data.data_ptr() == (
            shard.owner.data_ptr() + shard.start * shard.owner.element_size()
        )
        stop = shard.start + shard.weight.data.numel()
        ranges.setdefault(shard.owner.data_ptr(), []).append((shard.start, stop))
    assert ranges.keys() == tensors.keys()
    for pointer, parts in ranges.items():
        parts.sort()
        assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
        assert (parts[0][0], parts[-1][1]) == (0, tensors[pointer].numel())


def test_packed_projections_of_mamba_have_a_place_for_each_part(groups: Any) -> None:
    from hybrid_train.checkpoint.shards import shards_of

    engine = engine_of(groups, seed=1, pattern="M-")
    packed = "decoder.layers.0.mixer.in_proj.weight."
    found = shards_of(engine.network.chunks, groups)
    parts = [shard.weight.key for shard in found if shard.weight.key.startswith(packed)]
    assert [part.removeprefix(packed) for part in parts] == ["z", "x", "B", "C", "dt"]
    keys = [shard.weight.key for shard in found]
    assert len(set(keys)) == len(keys)
