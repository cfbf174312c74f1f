"""Optimizer state by the names of its weights, in float32 and in bfloat16 with masters."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.schema.optimizer import (
    AdamW,
    MasterFormat,
    MomentFormat,
)
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.problems import UserError
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS
from tests.unit.checkpoint.content import content_of, engine_of, named, take

pytestmark = MEGATRON_WARNINGS
BF16, FP32 = GemmFormat.bf16, GemmFormat.fp32


def through_a_file(groups: Any, run_dir: Path, saved: Any, loaded: Any) -> None:
    from hybrid_train.checkpoint import layout, store

    folder = store.save(run_dir, content_of(saved, groups), {"step": 2}, keep=1)
    store.load(layout.locate(folder), content_of(loaded, groups))


def reduced_state(moments: str, masters: str = "float32") -> AdamW:
    both = MomentFormat(moments)
    return AdamW(first_moment=both, second_moment=both, master_weights=MasterFormat(masters))


@pytest.mark.parametrize("format", [FP32, BF16])
@pytest.mark.parametrize("split", [True, False], ids="distributed_optimizer={}".format)
def test_every_element_of_every_weight_has_its_moments_once(
    groups: Any, split: bool, format: GemmFormat
) -> None:
    from hybrid_train.checkpoint.optimizer_state import state_parts
    from hybrid_train.checkpoint.shards import shards_of

    engine = engine_of(groups, seed=1, split=split, format=format)
    found = shards_of(engine.network.chunks, groups)
    parts = state_parts(engine.network.optimizer, found)
    trained = {id(p) for chunk in engine.network.chunks for p in chunk.parameters()}
    sizes = {"exp_avg": 0, "exp_avg_sq": 0, "master": 0}
    for part in parts:
        sizes[part.kind] += part.tensor.data.numel()
    numel = sum(shard.weight.data.numel() for shard in found if id(shard.owner) in trained)
    half = sum(
        shard.weight.data.numel()
        for shard in found
        if id(shard.owner) in trained and shard.weight.dtype == torch.bfloat16
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
    from hybrid_train.checkpoint import (
        layout,
        save_load,
        store,
    )

    content = content_of(engine_of(groups, seed=1), groups)
    with monkeypatch.context() as patch:
        patch.setattr(save_load, "STEP", "optimizer.iteration")  # of another version
        folder = store.save(tmp_path, content, {"step": 2}, keep=1)
    with pytest.raises(UserError, match="load_only=weights"):
        store.load(layout.locate(folder), content)


@pytest.mark.parametrize(
    ("moments", "format"),
    sampled(
        product(("bfloat16", "float16", "float8"), (FP32, BF16)),
        *(("bfloat16", BF16), ("float8", FP32)),
    ),
)
def test_a_run_with_lowered_moments_goes_on_as_if_it_had_not_stopped(
    groups: Any, tmp_path: Path, moments: str, format: GemmFormat
) -> None:
    saved = engine_of(groups, seed=1, steps=2, format=format, adamw=reduced_state(moments))
    loaded = engine_of(groups, seed=2, format=format, adamw=reduced_state(moments))
    through_a_file(groups, tmp_path, saved, loaded)
    before, after = named(saved, groups), named(loaded, groups)
    assert before.keys() == after.keys()
    assert {value.dtype for (key, _), value in before.items() if "optimizer." in key} == {
        torch.float32
    }
    # A scale is stored by what it scales, so it comes back to an ulp of float32.
    for key, value in after.items():
        torch.testing.assert_close(value, before[key], rtol=2**-22, atol=0)
    assert take(saved, 3) == pytest.approx(take(loaded, 3), rel=2**-20)


def test_moments_go_from_float32_to_bfloat16_and_back_and_are_rounded_once(
    groups: Any, tmp_path: Path
) -> None:
    whole = engine_of(groups, seed=1, steps=2)
    halved = engine_of(groups, seed=2, adamw=reduced_state("bfloat16"))
    again = engine_of(groups, seed=3)
    through_a_file(groups, tmp_path / "down", whole, halved)
    through_a_file(groups, tmp_path / "up", halved, again)
    before, after = named(whole, groups), named(again, groups)
    assert before.keys() == after.keys()
    rounded = 0
    for (key, offset), value in after.items():
        expected = before[key, offset]
        if key.startswith("optimizer."):
            rounded += not torch.equal(expected, expected.bfloat16().float())
            expected = expected.bfloat16().float()
        assert torch.equal(value, expected), key
    assert rounded
    # Against the run that never stopped: a share of 2^-8 of the updates, see test_reduced_state.py.
    expected_losses, found = take(whole, 3), take(again, 3)
    drop = expected_losses[0] - expected_losses[-1]
    assert drop > 0.3
    assert found == pytest.approx(expected_losses, abs=2**-8 * 2 * drop)


@pytest.mark.parametrize("masters", sampled(["float32", "float16"], "float32"))
def test_masters_go_from_whole_to_lowered_and_back(
    groups: Any, tmp_path: Path, masters: str
) -> None:
    whole = engine_of(groups, seed=1, steps=2, format=BF16)
    lower = engine_of(groups, seed=2, format=BF16, adamw=reduced_state("float16", masters))
    again = engine_of(groups, seed=3, format=BF16)
    through_a_file(groups, tmp_path / "down", whole, lower)
    through_a_file(groups, tmp_path / "up", lower, again)
    before, after = named(whole, groups), named(again, groups)
    moved = 0
    for (key, offset), value in after.items():
        expected = before[key, offset]
        if not key.startswith("optimizer."):
            assert torch.equal(value, expected), key
        elif key.startswith("optimizer.master.") and masters == "float32":
            moved += int((value != expected).sum())  # ties: by an ulp
            torch.testing.assert_close(value, expected, rtol=2**-22, atol=0)
        else:
            limit = float(expected.abs().max())
            torch.testing.assert_close(value, expected, rtol=2**-10, atol=2**-24 * limit)
    assert moved <= 8  # of 57,000; one in 2^16 is expected


def test_lowered_state_begins_with_the_weights_where_a_checkpoint_has_no_masters(
    groups: Any, tmp_path: Path
) -> None:
    saved = engine_of(groups, seed=1, steps=2, format=FP32)
    loaded = engine_of(groups, seed=2, format=BF16, adamw=reduced_state("bfloat16"))
    through_a_file(groups, tmp_path, saved, loaded)
    before, after = named(saved, groups), named(loaded, groups)
    masters = [(key, value) for key, value in after.items() if "optimizer.master." in key[0]]
    assert masters
    for (key, offset), value in masters:
        weight = before[key.removeprefix("optimizer.master."), offset]
        torch.testing.assert_close(value, weight, rtol=2**-22, atol=0)


def share_in_host_memory(share: float) -> AdamW:
    return AdamW(offload_share=share)


@pytest.mark.parametrize(
    ("before", "after", "format"),
    sampled(
        [
            *product((0.0, 0.5), (0.001, 1.0), (FP32, BF16)),
            *((1.0, 0.0, format) for format in (FP32, BF16)),
        ],
        *((0.5, 1.0, BF16), (0.0, 0.001, FP32), (1.0, 0.0, BF16)),
    ),
)
def test_a_run_goes_on_to_the_bit_with_another_share_in_host_memory(
    groups: Any, tmp_path: Path, before: float, after: float, format: GemmFormat
) -> None:
    saved = engine_of(groups, seed=1, steps=2, format=format, adamw=share_in_host_memory(before))
    loaded = engine_of(groups, seed=2, steps=1, format=format, adamw=share_in_host_memory(after))
    through_a_file(groups, tmp_path, saved, loaded)
    old, new = named(saved, groups), named(loaded, groups)
    assert old.keys() == new.keys()
    assert all(torch.equal(value, old[key]) for key, value in new.items())
    assert take(saved, 3) == take(loaded, 3)
    old, new = named(saved, groups), named(loaded, groups)
    assert all(torch.equal(value, old[key]) for key, value in new.items())


@pytest.mark.parametrize("format", [FP32, BF16])
def test_a_share_in_host_memory_begins_with_loaded_weights_alone(
    groups: Any, tmp_path: Path, format: GemmFormat
) -> None:
    from hybrid_train.checkpoint import store
    from hybrid_train.training.hooks.checkpointing import load_weights

    saved = engine_of(groups, seed=1, steps=2, format=format)
    folder = store.save(tmp_path, content_of(saved, groups), {"step": 2}, keep=1)
    losses = []
    for share in (0.0, 0.5, 1.0):
        begun = engine_of(groups, seed=2, format=format, adamw=share_in_host_memory(share))
        load_weights(folder, begun)
        losses.append(take(begun, 3))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_copy_that_is_written_meanwhile_is_not_changed_by_the_next_step(
    groups: Any, tmp_path: Path, share: float
) -> None:
    from hybrid_train.checkpoint import layout, store

    saved = engine_of(groups, seed=1, steps=2, format=BF16, adamw=share_in_host_memory(share))
    before = named(saved, groups)
    saving = store.start(tmp_path, content_of(saved, groups), {"step": 2}, keep=1, copy=True)
    take(saved, 2)
    loaded = engine_of(groups, seed=2, format=BF16)
    store.load(layout.locate(saving.finish()), content_of(loaded, groups))
    after = named(loaded, groups)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert any(not torch.equal(value, before[key]) for key, value in named(saved, groups).items())
