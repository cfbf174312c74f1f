"""Checkpoints: what is loaded equals what was saved, and only whole ones are found."""

import errno
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_train.config.problems import UserError
from hybrid_train.config.schema.parallel import Parallel
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
POSITION = {"step": 2, "tokens": 128, "sequences": 8}


def content_of(engine: Any, groups: Any) -> Any:
    from hybrid_train.checkpoint.megatron import Content

    return Content(engine.chunks, engine.optimizer, groups)


def engine_of(groups: Any, seed: int, *, split: bool = True, steps: int = 0) -> Any:
    job = tiny_job(parallel=Parallel(distributed_optimizer=split))
    job.train.seed = seed
    engine = tiny_engine(job, groups)
    for _ in range(steps):
        engine.step(microbatches(some_rows(), 2), tokens_seen=0)
    return engine


def weights_of(engine: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers, expert biases among them."""
    state = engine.chunks[0].module.state_dict()
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def moments_of(engine: Any) -> list[tuple[str, Tensor]]:
    """Master weights, moments and step counts, parameter by parameter."""
    found = []
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                found += [("weight", parameter.detach().clone())]
                found += [(name, state[name].clone()) for name in sorted(state)]
    return found


@pytest.mark.parametrize("split", [True, False], ids="distributed_optimizer={}".format)
def test_everything_comes_back_to_the_bit(groups: Any, tmp_path: Path, split: bool) -> None:
    from hybrid_train.checkpoint import layout, store

    saved = engine_of(groups, seed=1, split=split, steps=2)
    folder = store.save(tmp_path, content_of(saved, groups), POSITION, keep=1)
    draws = (random.random(), np.random.rand(), torch.rand(1).item())

    loaded = engine_of(groups, seed=2, split=split, steps=1)
    found = layout.latest(tmp_path)
    assert found is not None
    assert found.path == folder
    assert store.load(found, content_of(loaded, groups)) == POSITION
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws

    expected = weights_of(saved)
    assert any(value.any() for name, value in expected.items() if "expert_bias" in name)
    for name, value in weights_of(loaded).items():
        assert torch.equal(value, expected[name]), name
    for (name, value), (other, old) in zip(moments_of(loaded), moments_of(saved), strict=True):
        assert name == other
        assert torch.equal(value, old), name
    assert all(value.item() == 2 for name, value in moments_of(loaded) if name == "step")

    batches, others = microbatches(some_rows(), 2), microbatches(some_rows(), 2)
    for _ in range(2):  # and the two go on as one
        one, other = (e.step(b, tokens_seen=0) for e, b in ((saved, batches), (loaded, others)))
        assert (one.loss, one.grad_norm, one.metrics) == (
            other.loss,
            other.grad_norm,
            other.metrics,
        )
    expected = weights_of(saved)
    for name, value in weights_of(loaded).items():
        assert torch.equal(value, expected[name]), name


def test_weights_alone_leave_optimizer_and_random_numbers(groups: Any, tmp_path: Path) -> None:
    from hybrid_train.checkpoint import store
    from hybrid_train.checkpoint.megatron import read_weights

    saved = engine_of(groups, seed=1, steps=1)
    folder = store.save(tmp_path, content_of(saved, groups), POSITION, keep=1)
    loaded = engine_of(groups, seed=2)
    state = torch.get_rng_state()
    read_weights(folder, loaded.chunks, groups)
    assert torch.equal(torch.get_rng_state(), state)
    expected = weights_of(saved)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(loaded).items())
    assert not any(value.any() for name, value in moments_of(loaded) if name == "exp_avg")


def test_only_the_newest_stay(groups: Any, tmp_path: Path) -> None:
    from hybrid_train.checkpoint import layout, store

    content = content_of(engine_of(groups, seed=1), groups)
    for step in (9, 10, 11):
        store.save(tmp_path, content, {"step": step}, keep=2)
    assert [found.step for found in layout.complete(tmp_path)] == [10, 11]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000010",
        "step_00000011",
    ]


def test_saving_a_step_again_replaces_it(groups: Any, tmp_path: Path) -> None:
    from hybrid_train.checkpoint import layout, store

    content = content_of(engine_of(groups, seed=1), groups)
    store.save(tmp_path, content, {"step": 3, "tokens": 1}, keep=2)
    store.save(tmp_path, content, {"step": 3, "tokens": 2}, keep=2)
    (found,) = layout.complete(tmp_path)
    assert found.position() == {"step": 3, "tokens": 2}


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("told", [True, False], ids="told={}".format)
def test_full_disk_leaves_the_older_checkpoints_and_nothing_else(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    from hybrid_train.checkpoint import layout, megatron, store

    content = content_of(engine_of(groups, seed=1), groups)
    older = store.save(tmp_path, content, {"step": 1}, keep=1)
    files = {path: path.read_bytes() for path in older.rglob("*") if path.is_file()}

    def half(folder: Path, _: object) -> None:
        (folder / "shard").write_bytes(b"half of it")
        monkeypatch.setattr(Path, "write_bytes", _no_space)  # from here on the disk is full
        if told:
            _no_space()
        raise RuntimeError("a writer died")  # as Megatron's writers do, without the reason

    monkeypatch.setattr(megatron, "write", half)
    with pytest.raises(UserError, match=r"disk is full.*older checkpoints are whole"):
        store.save(tmp_path, content, {"step": 2}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert {path: path.read_bytes() for path in files} == files
    found = layout.latest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_other_errors_of_a_save_keep_their_words(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.checkpoint import megatron, store

    def broken(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(megatron, "write", broken)
    content = content_of(engine_of(groups, seed=1), groups)
    with pytest.raises(PermissionError, match="read-only"):
        store.save(tmp_path, content, {"step": 2}, keep=1)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_position_is_written_last(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that is cut off before the end leaves a folder that nobody takes for whole."""
    from hybrid_train.checkpoint import layout, megatron, store

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(megatron, "write", cut_off)
    content = content_of(engine_of(groups, seed=1), groups)
    with pytest.raises(KeyboardInterrupt):
        store.save(tmp_path, content, {"step": 5}, keep=1)
    assert (tmp_path / "checkpoints" / "step_00000005.partial").is_dir()
    assert layout.latest(tmp_path) is None
    monkeypatch.undo()
    final = store.save(tmp_path, content, {"step": 5}, keep=1)  # the next run starts it anew
    assert json.loads((final / "position.json").read_text()) == {"step": 5}
