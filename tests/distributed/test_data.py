"""The data of a run on two processes: one writes, both read, together they see what one sees."""

from pathlib import Path

import torch
from torch import distributed as dist

from hybrid_train.data.loader import Loader
from hybrid_train.data.quickstart import prepare
from hybrid_train.data.run_data import RunData, open_data
from hybrid_train.planning.phases import lay_out
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.train import Train, TrainJob
from tests.distributed.launch import run_distributed


def _data(folder: str, *, alone: bool) -> RunData:
    train = Train(tokens="2k", sequence_length=16, microbatch=2, global_batch=8)
    job = TrainJob(train=train, data=Quickstart(folder=folder, vocab_size=300))
    barrier = (lambda: None) if alone else dist.barrier
    return open_data(job.data, lay_out(job), barrier=barrier, is_main=alone or dist.get_rank() == 0)


def _loader(found: RunData, rank: int, size: int) -> Loader:
    phase_span = found.plans[0].phase_span
    return found.loader(phase_span, data_rank=rank, data_size=size, tokens_seen=0)


def _read_together(folder: str) -> None:
    own = _loader(_data(folder, alone=False), dist.get_rank(), 2)
    mine = torch.stack([next(own).tokens for _ in range(4)])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    alone = _loader(_data(folder, alone=True), 0, 1)  # written by now, so any rank may read it all
    whole = torch.stack([next(alone).tokens for _ in range(8)])
    assert torch.equal(torch.stack(both, dim=1).flatten(0, 1), whole)


def test_two_processes_read_the_batches_of_one(tmp_path: Path) -> None:
    source = tmp_path / "lib"
    source.mkdir()
    for i in range(40):
        (source / f"m{i}.py").write_text(f"def f{i}(x):\n    return {i} * x\n" * 10)
    folder = str(tmp_path / "out")
    prepare(Quickstart(folder=folder, vocab_size=300), source)
    run_distributed(_read_together, 2, folder)
