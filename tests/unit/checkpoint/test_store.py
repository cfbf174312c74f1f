"""Checkpoints: what is loaded equals what was saved, and only whole ones are found."""

import errno
import gc
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_train.schema.problems import UserError
from tests.full_disk import full_disk
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows
from tests.unit.checkpoint.content import content_of, engine_of, moments_of, weights_of

pytestmark = MEGATRON_WARNINGS
POSITION = {"step": 2, "tokens": 128, "source_tokens": {"web": 100, "code": 28}}


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
    from hybrid_train.checkpoint.save_load import read_weights

    saved = engine_of(groups, seed=1, steps=1)
    folder = store.save(tmp_path, content_of(saved, groups), POSITION, keep=1)
    loaded = engine_of(groups, seed=2)
    state = torch.get_rng_state()
    read_weights(folder, loaded.network.chunks, groups)
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


PARTS = [".distcp", ".metadata.tmp", "metadata.json", "plan.json", "position.json"]


@pytest.mark.parametrize("part", sampled(PARTS, ".distcp", "position.json"))
def test_full_disk_leaves_the_older_checkpoints_and_nothing_else(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    from hybrid_train.checkpoint import layout, store

    content = content_of(engine_of(groups, seed=1), groups)
    older = store.save(tmp_path, content, {"step": 1}, keep=1)
    files = {path: path.read_bytes() for path in older.rglob("*") if path.is_file()}
    full_disk(monkeypatch, part)
    with pytest.raises(UserError, match=r"disk is full.*older checkpoints are whole"):
        store.save(tmp_path, content, {"step": 2}, keep=1)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert {path: path.read_bytes() for path in files} == files
    found = layout.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert not writers()
    gc.collect()  # torch 2.11 would crash here, if its zip file were still held


def test_what_the_system_refuses_is_told_with_its_words(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.checkpoint import store

    content = content_of(engine_of(groups, seed=1), groups)
    older = store.save(tmp_path, content, {"step": 1}, keep=1)

    def refused(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refused)
    words = r"step_00000002 could not be written: .*Input/output error \(rank 0\); older"
    with pytest.raises(UserError, match=words):
        store.save(tmp_path, content, {"step": 2}, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_position_is_written_last_and_reaches_the_disk_before_the_final_name(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that is cut off before the end leaves a folder that nobody takes for whole."""
    from hybrid_train.checkpoint import layout, store

    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    def cut_off(partial: Path, final: Path) -> Path:
        if partial.name == ".metadata.tmp":
            return partial.replace(final)
        assert synced[-1] == partial.name
        assert {path.name for path in partial.iterdir()} <= {*synced, ".metadata"}
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", cut_off)
    content = content_of(engine_of(groups, seed=1), groups)
    with pytest.raises(KeyboardInterrupt):
        store.save(tmp_path, content, {"step": 5}, keep=1)
    assert (tmp_path / "checkpoints" / "step_00000005.partial" / "position.json").is_file()
    assert layout.latest(tmp_path) is None
    monkeypatch.undo()
    final = store.save(tmp_path, content, {"step": 5}, keep=1)  # the next run starts it anew
    assert layout.locate(final).position() == {"step": 5}


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [Path.unlink, _shorten], ids=["missing", "cut off"])
@pytest.mark.parametrize("part", ["__0_0.distcp", ".metadata", "metadata.json"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(
    groups: Any, tmp_path: Path, part: str, harm: Callable[[Path], None]
) -> None:
    from hybrid_train.checkpoint import layout, store

    content = content_of(engine_of(groups, seed=1), groups)
    folder = store.save(tmp_path, content, {"step": 2}, keep=1)
    harm(folder / part)
    with pytest.raises(UserError, match=r"step_00000002 is damaged: .*remove it, and") as error:
        store.load(layout.locate(folder), content)
    assert error.value.on_all_ranks


def test_random_states_of_another_kind_of_device_start_anew_with_a_word(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hybrid_train.checkpoint import layout, store

    # A job that ran in this process before keeps its messages from pytest.
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    content = content_of(engine_of(groups, seed=1), groups)
    cuda = torch.zeros(16, dtype=torch.uint8)  # the size of the state of a CUDA generator
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: cuda)
    folder = store.save(tmp_path, content, {"step": 2}, keep=1)
    monkeypatch.undo()
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    state = torch.get_rng_state()
    store.load(layout.locate(folder), content)
    assert torch.equal(torch.get_rng_state(), state)
    assert "kind of device than before: random states start anew" in caplog.text


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that ends no write of a file before the event."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    released = threading.Event()
    real = FileSystemWriterAsync.write_preloaded_data

    def held_back(*args: Any, **kwargs: Any) -> Any:
        assert released.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(held_back))
    yield released
    released.set()
    for thread in writers():
        thread.join()


def test_steps_taken_during_an_asynchronous_save_do_not_reach_the_file(
    groups: Any, tmp_path: Path, slow_disk: threading.Event
) -> None:
    from hybrid_train.checkpoint import layout, store

    saved = engine_of(groups, seed=1, steps=2)
    expected = weights_of(saved), moments_of(saved)
    saving = store.start(tmp_path, content_of(saved, groups), POSITION, keep=1, copy=True)
    saved.step(microbatches(some_rows(), 2), tokens_seen=0)
    assert not torch.equal(weights_of(saved)["decoder.final_norm.weight"], torch.ones(32))
    assert not saving.is_done()
    assert layout.latest(tmp_path) is None
    slow_disk.set()
    folder = saving.finish()
    assert saving.is_done()

    loaded = engine_of(groups, seed=2)
    store.load(layout.locate(folder), content_of(loaded, groups))
    for name, value in weights_of(loaded).items():
        assert torch.equal(value, expected[0][name]), name
    for (name, value), (other, old) in zip(moments_of(loaded), expected[1], strict=True):
        assert name == other
        assert torch.equal(value, old), name


def test_the_thread_of_a_save_leaves_the_device_alone(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its current CUDA device would be the first of the node, whatever that of the process is."""
    from hybrid_train.checkpoint import store

    callers = []
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda *_: callers.append(threading.current_thread())
    )
    content = content_of(engine_of(groups, seed=1), groups)
    for copy in (True, False):
        store.start(tmp_path, content, POSITION, keep=1, copy=copy).finish()
    assert set(callers) == {threading.main_thread()}


def test_a_copy_that_does_not_fit_into_memory_is_said(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.checkpoint import store

    def no_memory() -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 7 bytes")

    content = content_of(engine_of(groups, seed=1), groups)
    monkeypatch.setattr(torch.cuda, "synchronize", no_memory)  # the last thing of the copy
    with pytest.raises(UserError, match=r"no copy of .*\d MB, in host memory: can't allocate"):
        store.start(tmp_path, content, POSITION, keep=1, copy=True)
    assert not any((tmp_path / "checkpoints").iterdir())
    assert not writers()
