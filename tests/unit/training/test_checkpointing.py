"""When a run saves, what goes on meanwhile, and what is left when it fails."""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.data.batch import RowReader
from hybrid_train.data.loader import Loader
from hybrid_train.data.plan import Fields
from hybrid_train.schema.checkpoint import Checkpoint
from hybrid_train.schema.problems import UserError
from hybrid_train.training.loop import Hook, HookList
from tests.full_disk import full_disk
from tests.tiny import BATCH, LENGTH, MEGATRON_WARNINGS, batch_of, some_rows
from tests.unit.checkpoint.content import engine_of

pytestmark = MEGATRON_WARNINGS


@pytest.fixture(scope="module")
def engine(groups: Any) -> Any:
    return engine_of(groups, seed=1)


@dataclass
class At(Hook):
    """Does something at the end of a step."""

    step: int
    work: Callable[[], object]

    def step_end(self, run: Any, report: Any) -> None:
        if run.state.step == self.step:
            self.work()


class Rows:
    """Random rows, numbered."""

    def __init__(self, number: int) -> None:
        self._batch = batch_of(some_rows(number))

    def fill(self, row: int) -> Fields:
        names = ("tokens", "labels", "loss_weights", "position_ids")
        return {name: getattr(self._batch, name)[row].numpy() for name in names}


def run_of(engine: Any, run_dir: Path, steps: int, settings: Checkpoint, *hooks: Hook) -> Any:
    from hybrid_train.training.hooks.checkpointing import SaveCheckpoints
    from hybrid_train.training.loop import Run

    batches = Loader(RowReader(Rows(steps * BATCH)), microbatch=2, global_batch=lambda _: BATCH)
    run = Run(engine, batches, token_budget=steps * BATCH * LENGTH)
    run.hooks = HookList([SaveCheckpoints(settings, run_dir, -1), *hooks])
    return run


def saved(run_dir: Path) -> list[int]:
    from hybrid_train.checkpoint import layout

    return [found.step for found in layout.complete(run_dir)]


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@dataclass
class Disk:
    """Ends no write before it is released; counts how many were under way at once."""

    released: threading.Event
    writing: int = 0
    most: int = 0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, groups: Any) -> Iterator[Disk]:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    slow = Disk(threading.Event())
    real = FileSystemWriterAsync.write_preloaded_data

    def held_back(*args: Any, **kwargs: Any) -> Any:
        slow.writing += 1
        slow.most = max(slow.most, slow.writing)
        assert slow.released.wait(60)
        written = real(*args, **kwargs)
        slow.writing -= 1
        return written

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(held_back))
    yield slow
    slow.released.set()
    for thread in writers():
        thread.join()


def test_training_goes_on_while_a_checkpoint_is_written(
    engine: Any, tmp_path: Path, disk: Disk
) -> None:
    from hybrid_train.training.loop import fit

    seen: list[list[int]] = []
    watch = [At(step, lambda: seen.append(saved(tmp_path))) for step in (2, 3)]
    settings = Checkpoint(interval=2, keep=9)
    fit(run_of(engine, tmp_path, 5, settings, *watch, At(3, disk.released.set)))
    assert seen == [[], []]  # not whole yet, and step 3 is done
    assert saved(tmp_path) == [2, 4, 5]
    assert not writers()


def test_a_save_waits_for_the_one_before(engine: Any, tmp_path: Path, disk: Disk) -> None:
    from hybrid_train.training.loop import fit

    timer = threading.Timer(0.3, disk.released.set)  # well after the save of step 2 wants to begin
    timer.start()
    fit(run_of(engine, tmp_path, 4, Checkpoint(interval=1, keep=9)))
    timer.join()
    assert saved(tmp_path) == [1, 2, 3, 4]
    assert disk.most == 1


@pytest.mark.slow
def test_without_async_save_a_step_ends_when_its_checkpoint_is_whole(
    engine: Any, tmp_path: Path
) -> None:
    from hybrid_train.training.loop import fit

    seen: list[list[int]] = []
    watch = At(2, lambda: seen.append(saved(tmp_path)))
    fit(run_of(engine, tmp_path, 3, Checkpoint(interval=2, async_save=False), watch))
    assert seen == [[2]]
    assert saved(tmp_path) == [2, 3]


def test_a_write_that_fails_behind_the_steps_ends_the_run_with_the_reason(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.training.loop import fit

    run = run_of(
        engine,
        tmp_path,
        9,
        Checkpoint(interval=2),
        At(3, lambda: full_disk(monkeypatch, ".distcp")),
    )
    with pytest.raises(UserError, match=r"disk is full: .*step_00000004 could not be written"):
        fit(run)
    assert run.state.step in {5, 6}  # at the first step that finds it written, or the next save
    assert saved(tmp_path) == [2]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert not writers()


def fail() -> None:
    raise ZeroDivisionError("of a step")


def test_a_run_alone_that_fails_completes_the_save_in_flight(
    engine: Any, tmp_path: Path, disk: Disk
) -> None:
    from hybrid_train.training.loop import fit

    hooks = (At(3, disk.released.set), At(3, fail))
    with pytest.raises(ZeroDivisionError):
        fit(run_of(engine, tmp_path, 9, Checkpoint(interval=2), *hooks))
    assert saved(tmp_path) == [2]
    assert not writers()


def test_a_process_that_fails_alone_leaves_no_thread_and_waits_for_nobody(
    engine: Any, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.runtime import ranks
    from hybrid_train.training.loop import fit

    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    hooks = (At(3, disk.released.set), At(3, fail))
    with pytest.raises(ZeroDivisionError):
        fit(run_of(engine, tmp_path, 9, Checkpoint(interval=2), *hooks))
    assert saved(tmp_path) == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002.partial"]
    assert not writers()


def test_the_log_says_how_long_training_waited(
    engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.training.loop import fit

    # A job that ran in this process before keeps its messages from pytest.
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    with caplog.at_level(logging.INFO, "hybrid_train"):
        fit(run_of(engine, tmp_path, 1, Checkpoint()))
    assert f"saved {tmp_path}/checkpoints/step_00000001 in " in caplog.text
    assert "training waited" in caplog.text
