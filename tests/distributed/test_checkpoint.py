"""Checkpoints of two processes: whole or not there, back to the bit, readable by one process."""

import errno
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from hybrid_train.checkpoint import layout
from hybrid_train.runtime import cpu, ranks
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.problems import UserError
from tests.distributed.launch import run_distributed
from tests.distributed.reshard import stored_tensors
from tests.full_disk import full_disk
from tests.tiny import MEGATRON_WARNINGS, alone, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
LAYOUTS = {"tensor": Parallel(tensor=2), "expert": Parallel(expert=2)}
EPSILON = torch.finfo(torch.float32).eps


def engine_of(parallel: Parallel, groups: Any, seed: int) -> Any:
    job = tiny_job(parallel=parallel)
    job.train.seed = seed
    return tiny_engine(job, groups)


def content_of(engine: Any, groups: Any) -> Any:
    from hybrid_train.training.hooks import checkpointing

    return checkpointing.content_of(engine)


def batches_of(groups: Any) -> Any:
    parts = some_rows().split(2)
    return microbatches(torch.cat(parts[groups.dp.rank() :: groups.dp.size()]), 2)


def numbers_of(report: Any) -> dict[str, float]:
    return {"loss": report.loss, "grad_norm": report.grad_norm, **report.metrics}


def weights_of(engine: Any) -> dict[str, Tensor]:
    state = engine.network.chunks[0].module.state_dict()
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def _save_and_go_on(parallel: Parallel, groups: Any, run_dir: Path) -> dict[str, float]:
    """Two steps, a checkpoint, a third step; the same from the checkpoint; return the third."""
    from hybrid_train.checkpoint import store

    saved, batches = engine_of(parallel, groups, seed=1), batches_of(groups)
    for _ in range(2):
        saved.step(batches, tokens_seen=0)
    random.seed(dist.get_rank())  # every process has its own
    store.save(run_dir, content_of(saved, groups), {"step": 2}, keep=1)
    drawn, third = random.random(), numbers_of(saved.step(batches, tokens_seen=0))

    loaded = engine_of(parallel, groups, seed=2)
    found = layout.latest(run_dir)
    assert found is not None
    assert store.load(found, content_of(loaded, groups)) == {"step": 2}
    assert random.random() == drawn
    assert numbers_of(loaded.step(batches_of(groups), tokens_seen=0)) == third
    expected = weights_of(saved)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(loaded).items())
    return third


@dataclass(frozen=True)
class Fault:
    """What goes wrong on one process, and what both say."""

    rank: int
    arrange: Callable[[pytest.MonkeyPatch], None]
    main_says: str
    other_says: str


def _no_folder(patch: pytest.MonkeyPatch) -> None:
    from hybrid_train.checkpoint import store

    def no_space(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(store, "_make_empty", no_space)


def _no_memory(patch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MemoryError("no more pinned memory")

    patch.setattr(torch.cuda, "synchronize", refuse)  # the last thing of the copy


FAULTS = {
    "no folder": Fault(0, _no_folder, "disk is full", "No space left"),
    "no memory": Fault(
        1, _no_memory, "rank 1: no copy of what this process saves", "no copy.*no more pinned"
    ),
    "a part": Fault(
        1, partial(full_disk, suffix=".distcp"), "disk is full", r"No space left.*\(rank 1\)"
    ),
    "the description": Fault(
        0, partial(full_disk, suffix=".metadata.tmp"), "disk is full", "No space left"
    ),
    "the position": Fault(
        0, partial(full_disk, suffix="position.json"), "disk is full", "No space left"
    ),
}


def _keep_the_plan(parallel: Parallel, groups: Any, run_dir: Path) -> None:
    """All use the plan of the save before, or all make it anew if one of them has to."""
    from megatron.core import dist_checkpointing

    from hybrid_train.checkpoint import store
    from hybrid_train.checkpoint.writing import KeptSavePlan

    engine, plans = engine_of(parallel, groups, seed=1), []
    content, plan, megatron_plans = (
        content_of(engine, groups),
        KeptSavePlan(),
        dist_checkpointing.save,
    )

    def counted(*args: Any, **kwargs: Any) -> Any:
        plans.append(args)
        return megatron_plans(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist_checkpointing, "save", counted)
        for step, made in ((3, 1), (4, 1), (5, 2), (6, 2)):
            if step == 5 and ranks.rank() == 1:
                plan = KeptSavePlan()
            engine.step(batches_of(groups), tokens_seen=0)
            store.start(run_dir, content, {"step": step}, keep=1, copy=True, plan=plan).finish()
            assert len(plans) == made, step
    store.save(run_dir / "fresh", content, {"step": 6}, keep=1)
    found, expected = stored_tensors(run_dir), stored_tensors(run_dir / "fresh")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    ranks.barrier()


def _fail_to_save(parallel: Parallel, groups: Any, run_dir: Path, *, ask: bool) -> None:
    """Whatever fails on whichever process, all end with a reason, and none waits for another.

    With `ask` they look after each step whether it is done, as a run does.
    """
    from hybrid_train.checkpoint import store
    from hybrid_train.checkpoint.writing import KeptSavePlan

    content = content_of(engine_of(parallel, groups, seed=3), groups)
    plan = KeptSavePlan()

    def save(ask: bool) -> None:
        saving = store.start(run_dir, content, {"step": 3}, keep=1, copy=True, plan=plan)
        while ask and not saving.is_done():
            pass
        saving.finish()

    for name, fault in FAULTS.items():
        with pytest.MonkeyPatch.context() as patch:
            if ranks.rank() == fault.rank:
                fault.arrange(patch)
            words = fault.main_says if ranks.is_main() else fault.other_says
            with pytest.raises(UserError, match=words) as error:
                save(ask)
        assert error.value.on_all_ranks, name
        ranks.barrier()
        left = [path.name for path in (run_dir / "checkpoints").iterdir()]
        assert left == ["step_00000002"], name
        ranks.barrier()
    assert "checkpoint" not in {thread.name for thread in threading.enumerate()}


def _fail_to_load(parallel: Parallel, groups: Any, run_dir: Path) -> None:
    """A part that only the second process cannot read ends both."""
    from megatron.core import dist_checkpointing

    from hybrid_train.checkpoint import store

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    content = content_of(engine_of(parallel, groups, seed=3), groups)
    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank() == 1:
            patch.setattr(dist_checkpointing, "load_tensors_metadata", refuse)
        who = "rank 1: .*" if ranks.is_main() else ""
        with pytest.raises(UserError, match=f"{who}is damaged: .*Input/output error") as error:
            store.load(layout.locate(run_dir), content)
    assert error.value.on_all_ranks


def _on_two_processes(folder: Path) -> None:
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    third = {}
    for name, parallel in LAYOUTS.items():
        groups = build_groups(parallel, timeout_s=60)
        third[name] = _save_and_go_on(parallel, groups, folder / name)
        if name == "tensor":  # processes agree on what failed whatever they hold
            _fail_to_save(parallel, groups, folder / name, ask=False)
            _fail_to_save(parallel, groups, folder / name, ask=True)
            _fail_to_load(parallel, groups, folder / name)
        _keep_the_plan(parallel, groups, folder / "plan" / name)
        destroy_groups()
    groups = build_groups(Parallel(fsdp=True), timeout_s=60)
    _keep_the_plan(Parallel(fsdp=True), groups, folder / "plan" / "fsdp")
    destroy_groups()
    if dist.get_rank() == 0:
        torch.save(third, folder / "third.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the runs on two processes, whose checks have passed; groups of one process."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run_distributed(_on_two_processes, 2, folder)
    with alone() as groups:
        yield folder, groups


def test_one_process_goes_on_where_two_stopped(
    runs: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and optimizer state are read under another layout than they were saved under."""
    # A job that ran in this process before keeps its messages from pytest.
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    from hybrid_train.checkpoint import store

    folder, groups = runs
    engine = engine_of(Parallel(), groups, seed=9)
    store.load(layout.locate(folder / "tensor"), content_of(engine, groups))
    assert "random states start anew" in caplog.text
    report = engine.step(batches_of(groups), tokens_seen=0)
    expected = torch.load(folder / "third.pt")["tensor"]
    # The same float32 terms in another order, rows of 164 in 10 layers: sqrt(1640) / 2, about 20
    # ulps (tests/parity/verdict.py).
    assert numbers_of(report) == pytest.approx(expected, rel=20 * EPSILON)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_process_reads_the_weights_of_two(runs: Any, name: str) -> None:
    from hybrid_train.checkpoint.save_load import read_weights

    folder, groups = runs
    engines = [engine_of(Parallel(), groups, seed=seed) for seed in (1, 9)]
    for _ in range(2):
        engines[0].step(batches_of(groups), tokens_seen=0)
    read_weights(layout.locate(folder / name).path, engines[1].network.chunks, groups)
    expected = weights_of(engines[0])
    for key, value in weights_of(engines[1]).items():
        # Adam's update is the rate times a quotient with the error of the gradient, 20 ulps;
        # storing a weight rounds it. An element whose gradient is nothing but rounding may go
        # anywhere: there are few, so the mean is compared.
        rounding = EPSILON / 2 * expected[key].abs().max()
        assert (value - expected[key]).abs().mean() <= 2 * (1e-3 * 20 * EPSILON + rounding), key
