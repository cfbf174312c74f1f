"""Megatron-Core's own save and load on the other side, under layouts of two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.config import frozen
from hybrid_train.nvidia.arguments import to_arguments
from hybrid_train.nvidia.checkpoint_folders import Trainer
from hybrid_train.nvidia.export_checkpoint import export_as
from hybrid_train.nvidia.import_checkpoint import import_checkpoint
from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.train import TrainJob
from tests.core_save import load_as_megatron_lm, save_as_megatron_lm
from tests.distributed.launch import run_distributed
from tests.tiny import (
    EVERY_KIND,
    LENGTH,
    MEGATRON_WARNINGS,
    VOCAB,
    as_family,
    tiny_engine,
    tiny_job,
)
from tests.unit.checkpoint.content import content_of, take, weights_of

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.slow]
LAYOUTS = {
    "TP2": (Parallel(tensor=2), ""),
    # Core's format of split state misplaces it here: the embedding has a bucket of its own.
    "PP2": (Parallel(pipeline=2, distributed_optimizer=False), ""),
    # Each rank holds its gates, then its neurons, and core's files all gates first.
    "TP2, Qwen": (Parallel(tensor=2), "qwen"),
}
FOLDERS = {
    Trainer.megatron_lm: ("iter_0000002", ""),
    Trainer.bridge: ("iter_0000002", ""),
    Trainer.nemo: ("weights", "module."),
}


def job_of(family: str = "", **sections: Any) -> TrainJob:
    """A tiny hybrid, or a Transformer of a family."""
    job = tiny_job("*-*-" if family else EVERY_KIND, **sections)
    if family:
        as_family(job.model, family)
    return job


def engine_under(parallel: Parallel, groups: Any, seed: int, family: str = "") -> Any:
    job = job_of(family, parallel=parallel)
    job.train.seed = seed
    return tiny_engine(job, groups)


def _save_a_run(root: Path, parallel: Parallel, family: str = "") -> None:
    """Save the same engine as ours, as it goes on, and by core for Megatron-LM."""
    cpu.install()
    from hybrid_train.checkpoint import store
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    groups = build_groups(parallel, timeout_s=60)
    engine = engine_under(parallel, groups, 1, family)
    take(engine, 2)
    position = {"step": 2, "tokens": 8 * LENGTH}
    store.save(root / "run", content_of(engine, groups), position, keep=1)
    sharding = "fully_reshardable" if parallel.distributed_optimizer else ""
    job = job_of(family, run_dir=str(root / "run"))
    said = to_arguments(job.model) if family else {}
    save_as_megatron_lm(engine, groups, root / "theirs", sharding=sharding, **said)
    if dist.get_rank() == 0:
        job.model.vocab_size = VOCAB
        frozen.freeze(job, root / "run")
    destroy_groups()


def _loads_by_core(root: Path, parallel: Parallel, family: str = "") -> None:
    """Load each export by core, then the run by ours, and compare what this process has."""
    cpu.install()
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.checkpoint.shards import bare
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    groups = build_groups(parallel, timeout_s=60)
    found = {}
    for trainer, (folder, prefix) in FOLDERS.items():
        engine = engine_under(parallel, groups, 2, family)
        model = bare(engine.network.chunks[0])
        # First: a run of ours makes torch refuse what is beside their tensors, in this process.
        beside = load_as_megatron_lm(model, groups, root / trainer.name / folder, prefix)
        found[trainer] = weights_of(engine)
        assert beside.get("iteration", beside.get("global_step")) == 2, trainer
        if trainer is Trainer.megatron_lm:
            wanted = "*-*-" if family else "MEM*M-/*E/*E"
            assert beside["args"].hybrid_layer_pattern == wanted
    engine = engine_under(parallel, groups, 3, family)
    read_weights(layout.locate(root / "run").path, engine.network.chunks, groups)
    expected = weights_of(engine)
    for weights in found.values():
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    destroy_groups()


def _goes_on(root: Path, parallel: Parallel, family: str) -> list[list[float]]:
    """Go on from our checkpoint and from the imported one."""
    cpu.install()
    from hybrid_train.checkpoint import store
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    groups = build_groups(parallel, timeout_s=60)
    losses = []
    for seed, run in enumerate(("run", "imported"), start=4):
        engine = engine_under(parallel, groups, seed, family)
        store.load(layout.locate(root / run), content_of(engine, groups))
        losses.append(take(engine, 3))
    destroy_groups()
    return losses


@pytest.mark.parametrize("name", LAYOUTS)
def test_core_loads_what_was_exported_and_goes_on_here_with_what_it_saved(
    name: str, tmp_path: Path
) -> None:
    parallel, family = LAYOUTS[name]
    run_distributed(_save_a_run, 2, tmp_path, parallel, family)
    for trainer in FOLDERS:
        export_as(tmp_path / "run", tmp_path / trainer.name, None, trainer)
    run_distributed(_loads_by_core, 2, tmp_path, parallel, family)
    import_checkpoint(tmp_path / "theirs", tmp_path / "imported", None, None)
    for ours, imported in run_distributed(_goes_on, 2, tmp_path, parallel, family):
        assert imported == ours


def test_state_that_core_misplaces_stays_behind_and_weights_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_distributed(_save_a_run, 2, tmp_path, Parallel(pipeline=2))
    import_checkpoint(tmp_path / "theirs", tmp_path / "imported", None, None)
    assert "is not the master of its weight; Megatron-Core before #5077" in caplog.text
    with (
        StoredTensors(layout.locate(tmp_path / "run").path) as ours,
        StoredTensors(layout.locate(tmp_path / "imported").path) as imported,
    ):
        assert not any(name.startswith("optimizer.") for name in imported.names)
        for name in imported.names:
            rows = ours.shape(name)[0]
            assert torch.equal(ours.read(name, 0, rows), imported.read(name, 0, rows)), name


def test_core_refuses_an_export_without_the_states_that_its_modules_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or they were written for nothing."""
    from hybrid_train.nvidia import export_checkpoint
    from tests.distributed.launch import RankFailedError

    run_distributed(_save_a_run, 1, tmp_path, Parallel())
    monkeypatch.setattr(export_checkpoint, "_extra_states", lambda _: ())
    for trainer in FOLDERS:
        export_as(tmp_path / "run", tmp_path / trainer.name, None, trainer)
    with pytest.raises(RankFailedError, match="_extra_state"):
        run_distributed(_loads_by_core, 1, tmp_path, Parallel())
