"""Networks under layouts: weights of a run loaded anywhere; labels with float weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.config import frozen
from hybrid_train.data.batch import Batch
from hybrid_train.runtime import cpu
from hybrid_train.schema.objective import NextToken
from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.tiny import (
    BATCH,
    LENGTH,
    MEGATRON_WARNINGS,
    RUNTIME,
    VOCAB,
    alone,
    batch_of,
    some_rows,
    tiny_engine,
    tiny_job,
)

pytestmark = MEGATRON_WARNINGS
LAYOUTS = {"TP2": Parallel(tensor=2), "PP2": Parallel(pipeline=2)}
EPSILON = torch.finfo(torch.float32).eps


def batches_of(groups: Any) -> list[Batch]:
    """This rank's rows of the batch, one by one, with weights of several sizes."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.tensor([0.5, 2.0, 0.0, 0.3])[
        torch.randint(4, (BATCH, LENGTH), generator=generator)
    ]
    batches = [
        batch_of(row[None], weight[None]) for row, weight in zip(some_rows(), weights, strict=True)
    ]
    return batches[groups.dp.rank() :: groups.dp.size()]


def weighted_step(parallel: Parallel, groups: Any) -> dict[str, float]:
    job = tiny_job(parallel=parallel)
    job.train.microbatch = 1
    report = tiny_engine(job, groups).step(iter(batches_of(groups)), tokens_seen=0)
    return {"loss": report.loss, "grad_norm": report.grad_norm, **report.metrics}


def losses_of(loaded: Any) -> dict[str, float]:
    """Means of all terms over the batch, by a network without an optimizer."""
    from torch import distributed as dist

    from hybrid_train.training.engine import run_objective
    from hybrid_train.training.next_token import NextToken as Objective
    from hybrid_train.training.objective import Given

    network = loaded.network
    given = Given({}, network.groups, loaded.job.model, loaded.run_dir, load=lambda *_: network)
    with torch.no_grad():
        found = run_objective(
            network,
            Objective(NextToken(), given),
            batches_of(network.groups),
            shape=(1, LENGTH),
            forward_only=True,
        )
    dist.all_reduce(found.sums)
    return found.means(found.sums)


def _on_two_ranks(run_dir: Path) -> dict[str, dict[str, float]]:
    cpu.install()
    from hybrid_train.jobs.networks import load_model
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    found = {}
    for name, parallel in LAYOUTS.items():
        found[name] = losses_of(load_model(str(run_dir), RUNTIME, parallel=parallel))
        destroy_groups()
    groups = build_groups(Parallel(), timeout_s=60)
    found["DP2"] = weighted_step(Parallel(), groups)
    # A teacher joins the layout of a run that goes on.
    found["teacher"] = losses_of(load_model(str(run_dir), RUNTIME, groups=groups))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process computes, and what two do."""
    from hybrid_train.checkpoint import store

    run_dir = tmp_path_factory.mktemp("networks") / "run"
    job = tiny_job(run_dir=str(run_dir))
    job.model.vocab_size = VOCAB
    frozen.freeze(job, run_dir)
    with alone() as groups:
        from hybrid_train.training.hooks.checkpointing import content_of

        job.train.microbatch = 1
        engine = tiny_engine(job, groups)
        engine.step(iter(batches_of(groups)), tokens_seen=0)
        store.save(run_dir, content_of(engine), {"step": 1, "tokens": 64}, keep=1)
        evaluated = engine.evaluate(batches_of(groups))
        step = weighted_step(Parallel(), groups)
    return evaluated, step, run_distributed(_on_two_ranks, 2, run_dir)


@pytest.mark.parametrize("layout", [*LAYOUTS, "teacher"])
def test_a_run_loaded_under_any_layout_has_the_losses_of_one_process(
    found: Any, layout: str
) -> None:
    expected, _, ranks = found
    assert len(expected) == 3
    for rank in ranks:
        # 64 losses in another order, of layers whose sums are split: 64 half ulps.
        assert rank[layout] == pytest.approx(expected, rel=32 * EPSILON)


def test_float_weights_mean_the_same_to_two_data_parallel_ranks(found: Any) -> None:
    _, expected, ranks = found
    for rank in ranks:
        assert rank["DP2"] == pytest.approx(expected, rel=64 * EPSILON)
