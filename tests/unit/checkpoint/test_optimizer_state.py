"""Optimizer state by the names of its weights, in float32 and in bfloat16 with masters."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.config.problems import UserError
from hybrid_train.config.schema.precision import NumberFormat
from tests.tiny import MEGATRON_WARNINGS
from tests.unit.checkpoint.content import content_of, engine_of, named, take

pytestmark = MEGATRON_WARNINGS
BF16, FP32 = NumberFormat.bf16, NumberFormat.fp32


def through_a_file(groups: Any, run_dir: Path, saved: Any, loaded: Any) -> None:
    from hybrid_train.checkpoint import layout, store

    folder = store.save(run_dir, content_of(saved, groups), {"step": 2}, keep=1)
    store.load(layout.locate(folder), content_of(loaded, groups))


@pytest.mark.parametrize("format", [FP32, BF16])
@pytest.mark.parametrize("split", [True, False], ids="distributed_optimizer={}".format)
def test_every_element_of_every_weight_has_its_moments_once(
    groups: Any, split: bool, format: NumberFormat
) -> None:
    from hybrid_train.checkpoint.optimizer_state import state_parts
    from hybrid_train.checkpoint.places import places

    engine = engine_of(groups, seed=1, split=split, format=format)
    found = places(engine.chunks, groups)
    parts = state_parts(engine.optimizer, found)
    trained = {id(p) for chunk in engine.chunks for p in chunk.parameters()}
    sizes = {"exp_avg": 0, "exp_avg_sq": 0, "master": 0}
    for part in parts:
        sizes[part.kind] += part.tensor.data.numel()
    numel = sum(place.weight.data.numel() for place in found if id(place.owner) in trained)
    half = sum(
        place.weight.data.numel()
        for place in found
        if id(place.owner) in trained and place.weight.dtype == torch.bfloat16
    )
    assert sizes == {"exp_avg": numel, "exp_avg_sq": numel, "master": half}
    assert bool(half) == (format is BF16)


def test_masters_come_back_to_the_bit_whichever_optimizer_kept_them(
    groups: Any, tmp_path: Path
) -> None:
    saved = engine_of(groups, seed=1, steps=2, format=BF16)
    loaded = engine_of(groups, seed=2, format=BF16, split=False)
    through_a_file(groups, tmp_path, saved, loaded)
    before, after = named(saved, groups), named(loaded, groups)
    assert before.keys() == after.keys()
    assert any(key.startswith("optimizer.master.") for key, _ in before)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert take(saved, 2) == take(loaded, 2)


def test_a_float32_run_goes_on_from_the_masters_of_a_bfloat16_run(
    groups: Any, tmp_path: Path
) -> None:
    saved = engine_of(groups, seed=1, steps=2, format=BF16)
    loaded = engine_of(groups, seed=2, format=FP32)
    through_a_file(groups, tmp_path, saved, loaded)
    before, after = named(saved, groups), named(loaded, groups)
    differ = 0
    for (key, offset), value in after.items():
        master = before.get((f"optimizer.master.{key}", offset))
        expected = before[key, offset] if master is None else master
        assert torch.equal(value, expected), key
        differ += master is not None and not torch.equal(value, before[key, offset].float())
    assert differ  # the masters say more than the weights


def test_a_bfloat16_run_takes_the_weights_of_a_float32_run_as_its_masters(
    groups: Any, tmp_path: Path
) -> None:
    saved = engine_of(groups, seed=1, steps=2, format=FP32)
    loaded = engine_of(groups, seed=2, format=BF16)
    through_a_file(groups, tmp_path, saved, loaded)
    before, after = named(saved, groups), named(loaded, groups)
    masters = 0
    for (key, offset), value in after.items():
        if key.startswith("optimizer.master."):
            weight = before[key.removeprefix("optimizer.master."), offset]
            assert torch.equal(value, weight), key
            masters += 1
        else:
            assert torch.equal(value, before[key, offset].to(value.dtype)), key
    assert masters


def test_a_checkpoint_without_optimizer_state_is_refused_with_the_way_out(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.checkpoint import layout, megatron, store

    content = content_of(engine_of(groups, seed=1), groups)
    with monkeypatch.context() as patch:
        patch.setattr(megatron, "STEP", "optimizer.iteration")  # of another version
        folder = store.save(tmp_path, content, {"step": 2}, keep=1)
    with pytest.raises(UserError, match="load_only=weights"):
        store.load(layout.locate(folder), content)
