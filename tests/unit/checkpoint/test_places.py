"""Where the tensors of a process lie in the whole model."""

from typing import Any

import torch

from tests.tiny import MEGATRON_WARNINGS
from tests.unit.checkpoint.content import engine_of

pytestmark = MEGATRON_WARNINGS


def test_places_cover_every_parameter_and_buffer_once_and_share_its_memory(groups: Any) -> None:
    from hybrid_train.checkpoint.shards import bare, places

    engine = engine_of(groups, seed=1)
    (chunk,) = engine.network.chunks
    found = places([chunk], groups)
    state = bare(chunk).state_dict(keep_vars=True)
    tensors = {v.data_ptr(): v for v in state.values() if isinstance(v, torch.Tensor)}
    ranges: dict[int, list[tuple[int, int]]] = {}
    for place in found:
        assert place.weight.data.data_ptr() == (
            place.owner.data_ptr() + place.start * place.owner.element_size()
        )
        stop = place.start + place.weight.data.numel()
        ranges.setdefault(place.owner.data_ptr(), []).append((place.start, stop))
    assert ranges.keys() == tensors.keys()
    for pointer, parts in ranges.items():
        parts.sort()
        assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
        assert (parts[0][0], parts[-1][1]) == (0, tensors[pointer].numel())


def test_packed_projections_of_mamba_have_a_place_for_each_part(groups: Any) -> None:
    from hybrid_train.checkpoint.shards import places

    engine = engine_of(groups, seed=1, pattern="M-")
    packed = "decoder.layers.0.mixer.in_proj.weight."
    found = places(engine.network.chunks, groups)
    parts = [place.weight.key for place in found if place.weight.key.startswith(packed)]
    assert [part.removeprefix(packed) for part in parts] == ["z", "x", "B", "C", "dt"]
    keys = [place.weight.key for place in found]
    assert len(set(keys)) == len(keys)
