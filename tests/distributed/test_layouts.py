"""Two processes take the steps of one, whatever they split.

All layouts run in one pair of processes, since starting one costs more than the steps.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from hybrid_train.config.problems import UserError
from hybrid_train.config.schema.parallel import Parallel
from hybrid_train.runtime import cpu, ranks
from tests.distributed.launch import run_distributed
from tests.tiny import (
    MEGATRON_WARNINGS,
    VOCAB,
    alone,
    microbatches,
    some_rows,
    tiny_engine,
    tiny_job,
)

pytestmark = MEGATRON_WARNINGS
STEPS, RATE = 3, 1e-3  # the rate of tiny_job
EPSILON = torch.finfo(torch.float32).eps
LAYOUTS = {
    "data": Parallel(),
    "data, whole optimizer state": Parallel(distributed_optimizer=False),
    "tensor": Parallel(tensor=2),
    "pipeline": Parallel(pipeline=2),
    "expert": Parallel(expert=2),
    "tensor, experts by number": Parallel(tensor=2, expert=2, expert_tensor=1),
}


def job_of(parallel: Parallel) -> Any:
    pattern = "MEM|*M-/*E/*E" if parallel.pipeline == 2 else "MEM*M-/*E/*E"
    job = tiny_job(pattern, parallel=parallel)
    job.objective.moe_aux_loss_scale = 0.1  # large enough to be seen in the gradient
    return job


def train(job: Any, groups: Any, folder: Path) -> list[dict[str, float]]:
    """Take three steps; write the weights before and after them; return what was reported."""
    from hybrid_train.checkpoint.megatron import Content, write

    engine = tiny_engine(job, groups)
    content = Content(engine.chunks, engine.optimizer, groups)
    for name in ("before", "after"):
        if dist.get_rank() == 0:
            (folder / name).mkdir(parents=True)
    dist.barrier()
    if groups.dp.size() == 1 or job.parallel.expert > 1:  # elsewhere every process holds it all
        write(folder / "before", content)
    size, rank = groups.dp.size(), groups.dp.rank()
    parts = some_rows().split(2)  # microbatches of the whole run, dealt out in turn
    rows = torch.cat(parts[rank::size])
    batches = microbatches(rows, 2)
    reports = [engine.step(batches, tokens_seen=0) for _ in range(STEPS)]
    write(folder / "after", content)
    return [{"loss": r.loss, "grad_norm": r.grad_norm, **r.metrics} for r in reports]


def _fail_on_the_main_process() -> None:
    def work() -> None:
        raise ValueError("the disk is on fire")

    expected = ValueError if ranks.is_main() else UserError
    with pytest.raises(expected, match="the disk is on fire"):
        ranks.main_first(work)
    done = []
    ranks.main_first(lambda: done.append(1))
    assert done == ([1] if ranks.is_main() else [])


def _train_under_all_layouts(folder: Path) -> None:
    cpu.install()
    from hybrid_train.parallel.groups import build_groups, destroy_groups
    from hybrid_train.runtime.seeds import start_tracker

    _fail_on_the_main_process()
    reports = {}
    for name, parallel in LAYOUTS.items():
        groups = build_groups(parallel, timeout_s=60)
        start_tracker()
        reports[name] = train(job_of(parallel), groups, folder / name)
        destroy_groups()
    both: list[Any] = [None, None]
    dist.all_gather_object(both, reports)
    assert both[0] == both[1], "ranks report different things"
    if dist.get_rank() == 0:
        torch.save(reports, folder / "reports.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reports of every layout and of one process, and the folder with their weights."""
    folder = tmp_path_factory.mktemp("layouts")
    run_distributed(_train_under_all_layouts, 2, folder)
    reports = torch.load(folder / "reports.pt")
    with alone() as groups:
        reports["alone"] = train(job_of(Parallel()), groups, folder / "alone")
        yield reports, folder, groups


def weights(folder: Path, groups: Any) -> dict[str, Tensor]:
    """Read a checkpoint of whatever layout into one process."""
    from hybrid_train.checkpoint.megatron import read_weights
    from hybrid_train.model.build import build_model

    job = tiny_job()
    job.train.seed = 99  # other weights than any that were saved
    chunks = build_model(job, groups, VOCAB, on_gpu=False).chunks
    read_weights(folder, chunks, groups)
    return {k: v.clone() for k, v in chunks[0].state_dict().items() if isinstance(v, Tensor)}


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "expert", "tensor, experts by number"])
def test_first_weights_are_the_same_numbers_under_every_layout(runs: Any, layout: str) -> None:
    _, folder, groups = runs
    expected = weights(folder / "alone" / "before", groups)
    for name, value in weights(folder / layout / "before", groups).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reports_the_losses_of_one_process(runs: Any, layout: str) -> None:
    reports, _, _ = runs
    for step in range(STEPS):
        found, expected = reports[layout][step], reports["alone"][step]
        # Each layout sums the same float32 terms in another order. The longest sums are over the 64
        # tokens of a step and rows of at most 164 features, in 10 layers one after the other; the
        # roundings of K terms are a random walk of K half ulps: sqrt(10 * 164) / 2, about 20 ulps.
        assert found == pytest.approx(expected, rel=20 * EPSILON)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reaches_the_weights_of_one_process(runs: Any, layout: str) -> None:
    _, folder, groups = runs
    first = weights(folder / "alone" / "before", groups)
    expected = weights(folder / "alone" / "after", groups)
    for name, value in weights(folder / layout / "after", groups).items():
        assert "expert_bias" in name or not torch.equal(expected[name], first[name]), name
        # Adam's update is rate * (gradient / its own size) and inherits the relative error of the
        # gradient, 20 ulps; and storing a weight rounds it. An element whose gradient is nothing
        # but rounding may go anywhere within its 3 steps; there are few, so the mean is compared.
        rounding = EPSILON / 2 * expected[name].abs().max()
        off = (value - expected[name]).abs().mean()
        assert off <= STEPS * (RATE * 20 * EPSILON + rounding), name
