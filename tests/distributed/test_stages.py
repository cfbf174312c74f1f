"""Pipelines of uneven stages, and of several stages on each rank, take the steps of one process.

Wider comparisons of layouts are elsewhere; here stand the cuts, the parameters that a rank holds by
`planning/stages.py`, checkpoints of several chunks, and validation that fills no schedule.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from hybrid_train.planning import stages
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.tiny import (
    MEGATRON_WARNINGS,
    VOCAB,
    alone,
    batch_of,
    microbatches,
    some_rows,
    tiny_engine,
    tiny_job,
)

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.slow]
EPSILON = torch.finfo(torch.float32).eps
PATTERN = "MEM*M-/*E/*E"
TWICE = {"pipeline": 2, "virtual_pipeline": 2}
LAYOUTS = {
    "cut by cost": ("MEM*M-/*E/*E", Parallel(pipeline=2), False),
    "cut by hand": ("M|EM*M-/*E/*E", Parallel(pipeline=2), False),
    "two stages a rank": ("MEM*M-/*E/*E", Parallel(**TWICE), False),
    "two stages a rank, cut by hand": ("M|EM|*|M-/*E/*E", Parallel(**TWICE), False),
    "two stages a rank, tied": ("MEM*M-", Parallel(**TWICE), True),
}


def job_of(pattern: str, parallel: Parallel, *, tied: bool) -> Any:
    job = tiny_job(pattern, parallel=parallel)
    job.train.microbatch = 1  # four microbatches
    job.model.tie_embeddings = tied
    job.objective.moe_aux_loss_scale = 0.1  # large enough to be seen in the gradient
    return job


def reports_of(engine: Any, folder: Path, groups: Any) -> list[dict[str, float]]:
    """Two steps, a checkpoint, a third step, a validation of three microbatches."""
    from hybrid_train.checkpoint import store
    from hybrid_train.training.hooks.checkpointing import content_of

    batches = microbatches(some_rows(), 1)
    found = [engine.step(batches, tokens_seen=0) for _ in range(2)]
    store.save(folder, content_of(engine), {"step": 2}, keep=1)
    found.append(engine.step(batches, tokens_seen=0))
    held_out = [batch_of(row[None]) for row in some_rows(3, seed=1)]
    reports = [{"loss": r.loss, "grad_norm": r.grad_norm, **r.metrics} for r in found]
    return [*reports, engine.evaluate(held_out)]


def _train_under_all_layouts(folder: Path) -> Any:
    cpu.install()

    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    found = {}
    for name, (pattern, parallel, tied) in LAYOUTS.items():
        groups = build_groups(parallel, timeout_s=60)
        job = job_of(pattern, parallel, tied=tied)
        engine = tiny_engine(job, groups)
        planned = stages.stages(job, padded_vocab_size(VOCAB, job.model.vocab_multiple))
        mine = [stage.held.total for stage in planned if stage.rank == dist.get_rank()]
        assert sum(
            one.numel() for chunk in engine.network.chunks for one in chunk.parameters()
        ) == sum(mine), name
        found[name] = reports_of(engine, folder / name, groups)
        destroy_groups()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reports of every layout on each of two ranks, their checkpoints; groups of one process."""
    folder = tmp_path_factory.mktemp("stages")
    reports = run_distributed(_train_under_all_layouts, 2, folder)
    with alone() as groups:
        yield reports, folder, groups


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_cut_reports_what_one_process_does(runs: Any, layout: str, tmp_path: Path) -> None:
    (first, second), _, groups = runs
    pattern, _, tied = LAYOUTS[layout]
    job = job_of(pattern.replace("|", ""), Parallel(), tied=tied)
    expected = reports_of(tiny_engine(job, groups), tmp_path, groups)
    assert first[layout] == second[layout], "ranks report different things"
    for found, wanted in zip(first[layout], expected, strict=True):
        # The same float32 terms in another order, rows of 164 in 10 layers: sqrt(1640) / 2, about
        # 20 ulps (tests/parity/verdict.py).
        assert found == pytest.approx(wanted, rel=20 * EPSILON)
