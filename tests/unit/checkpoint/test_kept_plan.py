"""A plan is made once for the saves of a run, and never used for what it was not made for."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.schema.optimizer import AdamW, MomentFormat
from hybrid_train.schema.precision import GemmFormat
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS
from tests.unit.checkpoint.content import content_of, engine_of, named, take

pytestmark = MEGATRON_WARNINGS
HALF = MomentFormat.bfloat16
LOWERED = AdamW(first_moment=HALF, second_moment=HALF)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, groups: Any) -> list[str]:
    """The folders that Megatron has planned for."""
    from megatron.core import dist_checkpointing

    folders: list[str] = []
    plan = dist_checkpointing.save

    def counted(tensors: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
        folders.append(folder)
        return plan(tensors, folder, *args, **kwargs)

    monkeypatch.setattr(dist_checkpointing, "save", counted)
    return folders


def kept() -> Any:
    from hybrid_train.checkpoint.writing import KeptSavePlan

    return KeptSavePlan()


def save(engine: Any, groups: Any, run_dir: Path, plan: Any, step: int, *, copy: bool) -> Path:
    from hybrid_train.checkpoint import store

    content = content_of(engine, groups)
    position = {"step": step, "tokens": step}
    return store.start(run_dir, content, position, keep=9, copy=copy, plan=plan).finish()


def stored(folder: Path) -> dict[str, Tensor]:
    from hybrid_train.checkpoint.tensor_files import StoredTensors

    with StoredTensors(folder) as tensors:
        names = [name for name in tensors.names if not name.startswith("random.")]
        return {
            name: tensors.read(name, 0, tensors.shape(name)[0])
            for name in names
            if tensors.dtype(name) != torch.int64
        }


def same(one: Path, other: Path) -> bool:
    first, second = stored(one), stored(other)
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.mark.parametrize(
    ("copy", "adamw", "format"),
    sampled(
        product((True, False), (AdamW(), LOWERED), (GemmFormat.fp32, GemmFormat.bf16)),
        *((True, AdamW(), GemmFormat.fp32), (False, LOWERED, GemmFormat.bf16)),
    ),
)
def test_a_later_save_stores_what_a_first_one_would(
    groups: Any, tmp_path: Path, planned: list[str], copy: bool, adamw: AdamW, format: GemmFormat
) -> None:
    engine, plan = engine_of(groups, seed=1, steps=1, adamw=adamw, format=format), kept()
    before = save(engine, groups, tmp_path, plan, 1, copy=copy)
    take(engine, 1)
    again = save(engine, groups, tmp_path, plan, 2, copy=copy)
    assert len(planned) == 1
    fresh = save(engine, groups, tmp_path / "fresh", kept(), 2, copy=copy)
    assert len(planned) == 2
    assert same(again, fresh)
    assert not same(before, again)
    for file in ("__0_0.distcp", "metadata.json"):
        assert (again / file).stat().st_size == (fresh / file).stat().st_size


def test_a_run_goes_on_from_a_later_save(groups: Any, tmp_path: Path) -> None:
    from hybrid_train.checkpoint import layout, store

    engine, plan = engine_of(groups, seed=1, steps=1), kept()
    for step in (1, 2):
        folder = save(engine, groups, tmp_path, plan, step, copy=True)
        take(engine, 1)
    loaded = engine_of(groups, seed=2)
    store.load(layout.locate(folder), content_of(loaded, groups))
    take(loaded, 1)
    assert take(loaded, 2) == take(engine, 2)


def other_moments(engine: Any) -> None:
    for part in engine.network.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["exp_avg"] = torch.full_like(state["exp_avg"], 0.5)


def other_weights(engine: Any) -> None:
    for parameter in engine.network.chunks[0].parameters():
        parameter.data = torch.full_like(parameter, 0.25)


def other_biases(engine: Any) -> None:
    for module in engine.network.chunks[0].modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias = torch.full_like(module.expert_bias, 3.0)


@pytest.mark.parametrize("change", [other_moments, other_weights, other_biases])
def test_what_lies_elsewhere_in_memory_is_found(
    groups: Any, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    engine, plan = engine_of(groups, seed=1, steps=1), kept()
    before = save(engine, groups, tmp_path, plan, 1, copy=True)
    change(engine)
    found = stored(save(engine, groups, tmp_path, plan, 2, copy=True))
    expected = named(engine, groups)
    assert any(not torch.equal(value, found[name]) for name, value in stored(before).items())
    whole = {key: value for (key, _), value in expected.items() if value.shape == found[key].shape}
    assert len(whole) > 100
    assert all(torch.equal(value, found[key]) for key, value in whole.items())


@pytest.mark.parametrize("pattern", sampled(["MEM*M-/*E/*E", "MEM*M-", "M-"], "MEM*M-/*E/*E", "M-"))
def test_a_plan_of_another_model_is_not_used(
    groups: Any, tmp_path: Path, planned: list[str], pattern: str
) -> None:
    one = engine_of(groups, seed=1, steps=1, pattern="MEM*M-/*E/*E")
    other = engine_of(groups, seed=2, steps=2, pattern=pattern)
    plan = kept()
    save(one, groups, tmp_path, plan, 1, copy=True)
    found = save(other, groups, tmp_path, plan, 2, copy=True)
    # The same names and sizes may take the plan, but no tensors of the other model.
    assert len(planned) == (1 if pattern == "MEM*M-/*E/*E" else 2)
    assert same(found, save(other, groups, tmp_path / "fresh", kept(), 2, copy=True))


def test_a_change_of_format_is_no_case_for_the_plan(
    groups: Any, tmp_path: Path, planned: list[str]
) -> None:
    plan = kept()
    for step, format in enumerate((GemmFormat.fp32, GemmFormat.bf16)):
        engine = engine_of(groups, seed=1, steps=1, format=format)
        found = save(engine, groups, tmp_path, plan, step, copy=True)
    assert len(planned) == 2
    assert same(found, save(engine, groups, tmp_path / "fresh", kept(), 1, copy=True))
